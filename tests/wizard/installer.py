"""A stand-in for BlockHost's installer: what a provisioner's page finds there, and nothing more."""

import pathlib

from flask import Flask, render_template, session

from blockhost.provisioner_libvirt import wizard

STEPS = [
    {"id": "blockchain", "label": "Blockchain", "endpoint": "wizard_blockchain"},
    {"id": "libvirt", "label": "libvirt/KVM", "endpoint": "provisioner_libvirt.wizard_libvirt"},
    {"id": "connectivity", "label": "Connectivity", "endpoint": "wizard_connectivity"},
    {"id": "summary", "label": "Summary", "endpoint": "wizard_summary"},
]


def navigation(step):
    names = [entry["id"] for entry in STEPS]
    at = names.index(step)

    class Around:
        prev = STEPS[at - 1]["endpoint"] if at else None
        next = STEPS[at + 1]["endpoint"] if at + 1 < len(STEPS) else None

    return Around


def create():
    app = Flask("installer", template_folder=str(pathlib.Path(__file__).parent / "host/templates"))
    app.secret_key = "only for tests"
    # As in production: an exception is a page with status 500.
    app.config.update(TESTING=False, PROPAGATE_EXCEPTIONS=False)
    app.register_blueprint(wizard.blueprint)
    app.jinja_env.globals["wizard_nav"] = navigation

    @app.context_processor
    def everywhere():
        return {"wizard_steps": STEPS, "prov_ui": wizard.get_ui_params(session)}

    @app.route("/login")
    def login():
        session["authenticated"] = True
        return render_template("page.html", heading="Login")

    @app.route("/wizard/blockchain")
    def wizard_blockchain():
        return render_template("page.html", heading="Blockchain", step="blockchain")

    @app.route("/wizard/connectivity")
    def wizard_connectivity():
        return render_template("page.html", heading="Connectivity", step="connectivity")

    @app.route("/wizard/summary")
    def wizard_summary():
        return render_template(
            "page.html",
            heading="Summary",
            step="summary",
            section=wizard.get_summary_template(),
            provisioner_summary=wizard.get_summary_data(session),
        )

    return app
