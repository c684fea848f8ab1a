"""What BlockHost's installer imports: the page, the summary, the finalization steps.

It is imported as root before libvirt is there, and an exception here would end the installer: nothing but Flask and the
standard library is needed, and nothing is asked of the host before a page is.
"""

from flask import Blueprint, redirect, render_template, request, session, url_for

from . import bridge as bridges
from . import fields, steps
from .child import Failed
from .places import places

SESSION_KEY = "libvirt"

blueprint = Blueprint("provisioner_libvirt", __name__, template_folder="templates")


def _host():
    """The bridges of this host and the one to offer, as far as they can be told."""
    try:
        found = bridges.bridges()
        return found, bridges.choose(found, bridges.marked(places().run))
    except (Failed, OSError, ValueError):
        return {}, None


def _stored(where):
    """What the page stored, whatever became of it since."""
    try:
        values = where.get(SESSION_KEY)
    except Exception:  # noqa: BLE001 - the summary must never raise
        return {}
    return values if isinstance(values, dict) else {}


@blueprint.route("/wizard/libvirt", methods=["GET", "POST"])
def wizard_libvirt():
    if not session.get("authenticated"):
        return redirect(url_for("login"))
    found, chosen = _host()
    errors = {}
    if request.method == "POST":
        # Hand-made requests may lack fields, or send one twice; the first counts.
        typed = {name: request.form.get(name, "") for name in fields.NAMES}
        if not typed["bridge"] and chosen:
            typed["bridge"] = chosen.name
        values, errors = fields.check(typed, found)
        if not errors:
            session[SESSION_KEY] = values
            return redirect(url_for("wizard_connectivity"))
        shown = {name: text[:255] for name, text in typed.items()}
    else:
        offered = fields.defaults(chosen, places().vms)
        stored = {name: value for name, value in _stored(session).items() if name in fields.NAMES}
        shown = {name: str({**offered, **stored}.get(name, "")) for name in fields.NAMES}
    choices = [b for b in found.values() if b == chosen or (b.addresses and not bridges.SOMEBODY_ELSES.fullmatch(b.name))]
    return render_template(
        "provisioner_libvirt/libvirt.html",
        shown=shown,
        errors=errors,
        bridge=chosen,
        choices=choices,
        endpoint=request.endpoint,
    )


def get_ui_params(session):
    """Nothing of the installer's own pages depends on libvirt."""
    return {}


def get_summary_data(session):
    """The values for the summary; a value that is not there is an empty text. Never raises."""
    stored = _stored(session)
    return {name: str(stored.get(name, "") if stored.get(name) is not None else "") for name in fields.NAMES}


def get_summary_template():
    return "provisioner_libvirt/summary_section.html"


def get_finalization_steps():
    """(id, label, function[, hint]) in the order they are to run."""
    return [
        ("storage", "Preparing VM storage", steps.storage),
        ("network", "Finding the VM bridge", steps.network),
        ("db_config", "Writing the provisioner's settings", steps.db_config),
        ("template", "Building the VM template", steps.template, "takes several minutes"),
    ]
