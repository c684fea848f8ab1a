//! What differs, from one look. Nothing is asked or changed here.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

use provisioner_contract::{Record, RecordStatus, Timestamp, VmName};
use serde_json::{Map, Value};

use super::look::{Look, Records};
use super::mend::{self, Mend};
use super::{Finding, Kind};
use crate::database::Document;
use crate::database::mending::{Entry, mended};
use crate::host::Host;
use crate::host_route::{Entry as HostEntry, parse_mac};
use crate::journal::Operation;
use crate::libvirt::metadata::Metadata;
use crate::libvirt::survey::Surveyed;
use crate::libvirt::volume::VolumeNames;

/// All differences: those of the whole first, then those of each VM by its name.
pub(super) fn findings(host: &Host, look: &Look) -> Vec<Finding> {
    let mut all = Comparison { host, look, found: Vec::new() };
    all.database();
    all.journals();
    all.provisioning_lock();
    all.returned();
    for domain in &look.survey.domains {
        all.domain(domain);
    }
    if let Some(document) = look.document() {
        for (name, record) in document.raw_records() {
            all.record(document, name, record);
        }
        all.addresses(document);
        all.volumes(document);
        all.stale_routes(document);
    }
    all.pool();
    all.bases();
    let mut found = all.found;
    found.sort_by(|a, b| (&a.vm, a.kind, &a.object).cmp(&(&b.vm, b.kind, &b.object)));
    found
}

struct Comparison<'a> {
    host: &'a Host,
    look: &'a Look,
    found: Vec<Finding>,
}

/// What the keys of a record must be by the domain's metadata, as far as only a create decides about them.
pub(super) fn truth(metadata: &Metadata) -> Map<String, Value> {
    let mut truth = Map::new();
    let mut put = |key: &str, value: Value| truth.insert(key.to_owned(), value);
    put("vm_name", metadata.name.as_str().into());
    put("vmid", 0.into());
    put("ip_address", metadata.ipv4.to_string().into());
    put("ipv6_address", metadata.ipv6.map(|a| a.to_string()).unwrap_or_default().into());
    put("owner", metadata.wallet_address.as_str().into());
    put("created_at", metadata.created_at.as_str().into());
    put("purpose", "".into());
    put("wallet_address", metadata.wallet_address.as_str().into());
    put("username", metadata.username.as_str().into());
    put("network_mode", metadata.network_mode.as_str().into());
    truth
}

/// Whether a record that says "destroyed" is about an earlier VM than the domain.
pub(super) fn is_of_an_earlier_vm(record: &Value, metadata: &Metadata) -> bool {
    let destroyed = record.get("status").and_then(Value::as_str) == Some(RecordStatus::Destroyed.as_str());
    let at = |value: Option<&str>| value.and_then(|text| text.parse::<Timestamp>().ok());
    let created = at(record.get("created_at").and_then(Value::as_str));
    let ours = at(Some(&metadata.created_at));
    destroyed && matches!((created, ours), (Some(created), Some(ours)) if created < ours)
}

impl Comparison<'_> {
    fn add(&mut self, finding: Finding) {
        self.found.push(finding);
    }

    fn is_free(&self, name: &str) -> bool {
        // A dead command's leftovers are cleared first, and change what there is to compare.
        let journalled = self.look.journals.iter().any(|(of, _)| of.as_str() == name);
        !self.look.is_busy(name) && !journalled && !self.look.has_returned(name)
    }

    fn database(&mut self) {
        let path = self.host.settings.db_file.display().to_string();
        match &self.look.records {
            Records::Read(_) => {}
            Records::Unreadable(error) => {
                let what = format!("no record can be compared: {}", error.in_full());
                self.add(Finding::new(Kind::DatabaseUnreadable, None, &path, what).operator(format!(
                    "restore {path} from a backup; or move it away, and blockhost-provisioner-repair --apply rebuilds it from the domains"
                )));
            }
            Records::Missing => {
                let marked = self.look.survey.domains.iter().filter(|domain| self.look.is_own(self.host, domain));
                let count = marked.count();
                if count > 0 {
                    let what = format!("there is no VM database, and libvirt has {count} of BlockHost's domains");
                    let finding = Finding::new(Kind::DatabaseMissing, None, &path, what);
                    self.add(
                        finding.applies(Mend::Nothing, format!("rebuilds it from the metadata of {count} domains")),
                    );
                }
            }
        }
    }

    fn journals(&mut self) {
        for (name, journal) in &self.look.journals {
            if self.look.is_busy(name.as_str()) {
                continue;
            }
            let object = self.host.dirs.journal().join(format!("{name}.json")).display().to_string();
            let finding = match journal {
                Ok(journal) => {
                    let what = format!("{} (PID {}) died while working on {name}", journal.command, journal.owner.pid);
                    let act = match journal.operation {
                        Operation::Create => "undoes that create, which was never reported as done",
                        Operation::Destroy => "finishes that destroy",
                        Operation::Suspend => "finishes that suspension, or takes it back",
                    };
                    Finding::new(Kind::DeadJournal, Some(name.as_str()), object, what).applies(Mend::Recover, act)
                }
                Err(error) => Finding::new(Kind::DamagedJournal, Some(name.as_str()), &object, error.in_full())
                    .operator(format!(
                        "look at what exists of {name} (virsh domstate {name}; the pool), remove it, then {object}"
                    )),
            };
            self.add(finding);
        }
    }

    fn provisioning_lock(&mut self) {
        if self.look.creating == Some(false) {
            let path = self.host.dirs.run.join("provisioning.lock").display().to_string();
            let what = "it says that a create is in flight, and none is: engines wait for it";
            let finding = Finding::new(Kind::StaleProvisioningLock, None, path, what);
            self.add(finding.applies(Mend::SweepLock, "removes it"));
        }
    }

    /// What is nobody's any more: never a VM whose record is lost.
    fn returned(&mut self) {
        for returned in &self.look.returned {
            let (stone, what) = (&returned.stone, returned.what());
            let name = stone.vm_name.as_str();
            if self.look.is_busy(name) || self.look.journals.iter().any(|(of, _)| of.as_str() == name) {
                continue;
            }
            let why = format!(
                "{what} came back after {} had removed {name} ({}): libvirt carried out late what had been given up",
                stone.command, stone.started_at
            );
            let finding = Finding::new(Kind::RemovedVmReturned, Some(name), name, why);
            self.add(finding.applies(Mend::Recover, "removes it"));
        }
    }

    /// What a domain is by itself, and one whose record is lost.
    fn domain(&mut self, domain: &Surveyed) {
        let name = domain.name();
        if !self.is_free(name) {
            return;
        }
        if self.look.is_unmarked(self.host, domain) && !domain.facts.metadata_damaged {
            let readable = !matches!(self.look.records, Records::Unreadable(_));
            if readable {
                let what =
                    "its disk is named as a VM's of ours, but it has no record, and no metadata to make one from";
                self.add(Finding::new(Kind::DomainWithoutRecord, Some(name), name, what).operator(format!(
                    "if it is of an earlier provisioner, restore its record from a backup of the database; if not, give its disk another name than {name}.qcow2"
                )));
            }
            return;
        }
        if domain.facts.metadata_damaged && self.look.is_of_this_host(self.host, domain) {
            let what = "its BlockHost metadata cannot be read: its record could not be rebuilt";
            self.add(
                Finding::new(Kind::DamagedMetadata, Some(name), name, what)
                    .operator(format!("correct <blockhost:vm> in: virsh edit {name}")),
            );
        }
        if !self.look.is_own(self.host, domain) {
            return;
        }
        if domain.is_up() && !domain.persistent {
            let what = "it runs, and libvirt keeps no definition of it: it would be gone when it stops";
            self.add(Finding::new(Kind::DomainNotPersistent, Some(name), name, what).operator(format!(
                "virsh dumpxml {name} --security-info --migratable > {name}.xml && virsh define {name}.xml"
            )));
        }
        let Some(metadata) = &domain.facts.metadata else { return };
        let record = match &self.look.records {
            Records::Read(document) => document.raw_record(&metadata.name),
            Records::Missing => None,
            Records::Unreadable(_) => return,
        };
        let missing = match record {
            None => true,
            Some(record) => is_of_an_earlier_vm(record, metadata),
        };
        if missing {
            self.lost_record(domain, metadata);
        }
    }

    fn lost_record(&mut self, domain: &Surveyed, metadata: &Metadata) {
        let name = domain.name();
        let what = "the domain is BlockHost's and the database has no record of it";
        let finding = Finding::new(Kind::DomainWithoutRecord, Some(name), name, what);
        let addresses = [Some(metadata.ipv4.into()), metadata.ipv6.map(IpAddr::from)];
        let document = self.look.document();
        let holder = addresses.iter().flatten().find_map(|address| document?.holder_of(name, *address));
        let finding = match (holder, mend::restored(self.host, metadata, domain, self.look.now)) {
            (Some(other), _) => finding.operator(format!(
                "{other} has its address by now: see which of the two is to stay, and destroy the other with blockhost-vm-destroy"
            )),
            (None, Err(error)) => finding.operator(format!("its metadata makes no record: {}", error.in_full())),
            (None, Ok(restored)) => {
                let mut act = format!("puts back its record as {}, until {}", restored.record.status, restored.record.expires_at);
                if restored.expired {
                    act += &format!(
                        "; at creation it was until {}, which may have been extended: then say so with blockhost-vm-resume {name} --extend-days N",
                        metadata.expires_at
                    );
                }
                finding.applies(Mend::Restore, act)
            }
        };
        self.add(finding);
    }

    fn record(&mut self, document: &Document, name: &str, raw: &Value) {
        if !self.is_free(name) {
            return;
        }
        let Ok(vm) = VmName::new(name) else {
            let what = "this is no name of a VM: no command can do anything about it";
            let finding = Finding::new(Kind::DamagedRecord, None, name, what);
            return self.add(finding.operator("correct it in the database; see who wrote it"));
        };
        let domain = self.look.survey.domain(name);
        let own = domain.filter(|domain| self.look.is_own(self.host, domain));
        let metadata = own.and_then(|own| own.facts.metadata.as_ref());
        let record = match document.record(&vm) {
            Ok(Some(record)) => record,
            Ok(None) => return,
            Err(error) => {
                let finding = Finding::new(Kind::DamagedRecord, Some(name), name, error.in_full());
                let fixable = metadata.is_some_and(|metadata| mended(name, raw, &truth(metadata)).is_ok());
                return self.add(if fixable {
                    finding
                        .applies(Mend::Types, "puts in what the domain's metadata says, and leaves the rest as it is")
                } else {
                    finding.operator("correct it in the database, or restore it from a backup")
                });
            }
        };
        match (domain, own) {
            (Some(_), None) if record.is_live() => {
                let what = "the domain of that name is not BlockHost's: neither its metadata nor its disk says so";
                self.add(Finding::new(Kind::ForeignDomain, Some(name), name, what).operator(format!(
                    "rename it (virsh domrename {name} NEW-NAME), then restore the VM's own domain, or: blockhost-vm-destroy {name}"
                )));
            }
            (None, _) if record.is_live() => {
                let what = format!("its record is {}, and libvirt has no domain of that name", record.status);
                let disk = VolumeNames::of(&vm).overlay;
                let there = self.look.volumes.iter().flatten().any(|(volume, _)| *volume == disk);
                let disk = if there {
                    format!("its disk {disk} is still there")
                } else {
                    format!("its disk {disk} is gone, too")
                };
                self.add(
                    Finding::new(Kind::RecordWithoutDomain, Some(name), name, format!("{what}; {disk}")).operator(
                        format!("define its domain again from a backup; or give it up: blockhost-vm-destroy {name}"),
                    ),
                );
            }
            (_, Some(own)) if record.is_live() => self.living(document, &vm, &record, own),
            (_, Some(own)) if metadata.is_none_or(|metadata| !is_of_an_earlier_vm(raw, metadata)) => {
                let what = format!(
                    "its record is destroyed, and its domain exists, {}",
                    if own.is_up() { "running" } else { "off" }
                );
                self.add(Finding::new(Kind::DestroyedVmExists, Some(name), name, what).operator(format!(
                    "blockhost-vm-destroy {name}; or, if it is to stay, correct the status in the database"
                )));
            }
            _ => {}
        }
    }

    /// A live record and its domain.
    fn living(&mut self, document: &Document, vm: &VmName, record: &Record, own: &Surveyed) {
        let name = vm.as_str();
        let suspended = record.status == RecordStatus::Suspended;
        let runs_on = suspended && own.is_up();
        let paid = record.expires_at.is_none_or(|at| at > self.look.now);
        if runs_on {
            let finding = Finding::new(
                Kind::SuspendedVmRuns,
                Some(name),
                name,
                format!(
                    "its record is suspended and it runs; it is paid {}",
                    if paid { "for" } else { "for no longer" }
                ),
            );
            self.add(if paid {
                finding.applies(Mend::MarkActive, "marks it active, and lets it start with the host")
            } else {
                finding.operator(format!("blockhost-vm-stop {name}; or, if it is to stay: blockhost-vm-resume {name}"))
            });
        }
        let marked = own.facts.metadata.is_some();
        // An earlier provisioner never let its VMs start with the host.
        if own.persistent && !suspended && !own.autostart && marked {
            let what = "it is active and would stay off when the host starts again";
            let finding = Finding::new(Kind::AutostartOff, Some(name), name, what);
            self.add(finding.applies(Mend::Autostart(true), "lets it start with the host"));
        } else if suspended && own.autostart && !(runs_on && paid) {
            let what = "it is suspended and would run when the host starts again";
            let finding = Finding::new(Kind::AutostartOn, Some(name), name, what);
            self.add(finding.applies(Mend::Autostart(false), "lets it no longer start with the host"));
        }
        if let Some(metadata) = &own.facts.metadata {
            self.against_metadata(document, vm, record, metadata);
        }
        let ipv6 = record.ipv6().or(own.facts.metadata.as_ref().and_then(|metadata| metadata.ipv6));
        if let Some(address) = ipv6
            && own.is_up()
            && let Some(links) = &self.look.links
        {
            let bridge = &self.host.settings.bridge;
            let mac = own.facts.macs.first().and_then(|mac| parse_mac(mac));
            let neighbour = mac.filter(|mac| links.neighbours.get(&address) != Some(mac)).map(HostEntry::Neighbour);
            let (kind, what, does) = match (links.routes.contains(&address), neighbour) {
                (true, None) => return,
                (false, _) => {
                    let what = format!("it runs, and the host does not route {address} to {bridge}");
                    (Kind::MissingRoute, what, "sets the route")
                }
                (true, Some(_)) => {
                    let what = format!("it runs, and the host would believe another VM that claims {address}");
                    (Kind::MissingNeighbour, what, "ties the address to its MAC address")
                }
            };
            let missing =
                (kind == Kind::MissingRoute).then_some(HostEntry::Route).into_iter().chain(neighbour).collect();
            let finding = Finding::new(kind, Some(name), address.to_string(), what);
            self.add(finding.applies(Mend::AddEntries(address, missing), does));
        }
    }

    fn against_metadata(&mut self, document: &Document, vm: &VmName, record: &Record, metadata: &Metadata) {
        let name = vm.as_str();
        let nft = |id: Option<&provisioner_contract::NftId>| id.map(ToString::to_string).unwrap_or_default();
        let shown = |address: String| address.parse::<IpAddr>().map_or(address, |parsed| parsed.to_string());
        let truth = truth(metadata);
        let pairs = [
            ("vm_name", record.vm_name.clone(), name.to_owned()),
            ("ip_address", shown(record.ip_address.clone()), metadata.ipv4.to_string()),
            (
                "ipv6_address",
                shown(record.ipv6_address.clone()),
                metadata.ipv6.map(|a| a.to_string()).unwrap_or_default(),
            ),
            ("wallet_address", record.wallet_address.clone(), metadata.wallet_address.to_string()),
            ("username", record.username.clone(), metadata.username.to_string()),
            ("network_mode", record.network_mode.clone(), metadata.network_mode.clone()),
            // Only engines write it, and later.
            ("nft_token_id", nft(record.nft_token_id.as_ref()), nft(metadata.nft_token_id.as_ref())),
        ];
        for (key, recorded, known) in pairs {
            if recorded == known || known.is_empty() && recorded.is_empty() {
                continue;
            }
            if recorded.is_empty() {
                let address = known.parse::<IpAddr>().ok().filter(|_| key.starts_with("ip"));
                let taken = address.and_then(|address| document.holder_of(name, address));
                let Some(value) = truth.get(key).filter(|_| key != "nft_token_id" && taken.is_none()) else { continue };
                let what = format!("its record has no {key}");
                let finding = Finding::new(Kind::IncompleteRecord, Some(name), key, what);
                self.add(
                    finding.applies(
                        Mend::Fill(key, value.clone()),
                        format!("puts in {known}, from the domain's metadata"),
                    ),
                );
            } else if !known.is_empty() && !["network_mode", "username"].contains(&key) {
                let what = format!("its record says {recorded}, the domain's metadata {known}");
                let hint = match key {
                    "ip_address" | "ipv6_address" => {
                        "the domain can send only from the address in its metadata: correct the record, unless the domain was changed by hand"
                    }
                    _ => {
                        "if the VM changed hands that is as it should be: bring the metadata in line with virsh edit; if not, correct the record"
                    }
                };
                self.add(Finding::new(Kind::RecordDisagrees, Some(name), key, what).operator(hint));
            }
        }
        if record.expires_at.is_none()
            && let Ok(expiry) = mend::expiry(self.host, metadata, self.look.now)
        {
            let what = "its record has no expires_at: it would never expire";
            let finding = Finding::new(Kind::IncompleteRecord, Some(name), "expires_at", what);
            self.add(finding.applies(
                Mend::Fill("expires_at", expiry.0.to_string().into()),
                format!("puts in {}, by the domain's metadata", expiry.0),
            ));
        }
    }

    fn addresses(&mut self, document: &Document) {
        let look = self.look;
        // Who has which address: live records, and domains of ours.
        let mut owners: BTreeMap<IpAddr, BTreeSet<&str>> = BTreeMap::new();
        for (name, record) in document.raw_records().filter(|(_, record)| Document::stands_for_a_vm(record)) {
            for address in Document::addresses_of(record).unwrap_or_default() {
                owners.entry(address).or_default().insert(name);
            }
        }
        let recorded: BTreeSet<IpAddr> = owners.keys().copied().collect();
        for domain in look.survey.domains.iter().filter(|domain| look.is_own(self.host, domain)) {
            for address in domain.facts.addresses() {
                owners.entry(address).or_default().insert(domain.name());
            }
        }
        for (address, vms) in &owners {
            if vms.len() > 1 && vms.iter().all(|vm| self.is_free(vm)) {
                let vms: Vec<_> = vms.iter().copied().collect();
                let what = format!("{} have {address}", vms.join(" and "));
                self.add(Finding::new(Kind::AddressTwice, None, address.to_string(), what).operator(
                    "see which of them is to keep it; correct the other's record, or destroy it with blockhost-vm-destroy: the address stays the first one's",
                ));
            }
        }
        let mut listed: BTreeMap<IpAddr, u32> = BTreeMap::new();
        for entry in document.allocated() {
            match entry {
                Entry::Address(address) => *listed.entry(address).or_default() += 1,
                Entry::Other(text) => {
                    let what = "an entry of the allocated addresses is no address, or in the wrong list";
                    let finding =
                        Finding::new(Kind::DamagedAddressEntry, None, text.chars().take(80).collect::<String>(), what);
                    self.add(finding.operator("remove it from the database; see who wrote it"));
                }
            }
        }
        for (address, vms) in &owners {
            if !listed.contains_key(address)
                && let Some(vm) = vms.iter().find(|vm| self.is_free(vm))
                // What belongs to no record yet is allocated with it.
                && recorded.contains(address)
            {
                let what = format!("{vm} has {address}, and it is not among the allocated addresses");
                let finding = Finding::new(Kind::AddressNotAllocated, Some(vm), address.to_string(), what);
                self.add(finding.applies(Mend::Allocate(*address), "allocates it"));
            }
        }
        let unknown = look.unknown_holder(self.host);
        for (address, count) in listed {
            if count > 1 {
                let what =
                    format!("{address} is listed {count} times: giving it back once frees it for good, or not at all");
                let finding = Finding::new(Kind::AddressListedTwice, None, address.to_string(), what);
                self.add(finding.applies(Mend::ListOnce(address), "lists it once"));
            }
            if owners.contains_key(&address)
                || look.claims.contains(&address)
                || look.survey.in_use.addresses.contains(&address)
            {
                continue;
            }
            let what = format!("{address} is allocated, and no record, domain or command under way has it");
            let finding = Finding::new(Kind::AddressWithoutOwner, None, address.to_string(), what);
            match &unknown {
                // In a moment it is somebody's, or it is still there to be found.
                Some(_) if look.creating == Some(true) => {}
                Some(why) => self.add(finding.operator(format!("it is not freed while {why}"))),
                None => self.add(finding.applies(Mend::Free(address), "frees it")),
            }
        }
        if let Some(next) = document.late_next_vmid() {
            let what = "next_vmid is a number that a record has, or lower";
            let finding = Finding::new(Kind::NextVmidBehind, None, "next_vmid", what);
            self.add(finding.applies(Mend::NextVmid, format!("sets it to {next}")));
        }
    }

    fn pool(&mut self) {
        if let Err(error) = &self.look.volumes {
            let pool = &self.host.settings.storage_pool;
            let finding = Finding::new(Kind::PoolUnusable, None, pool, error.in_full());
            self.add(finding.operator(format!("virsh pool-start {pool}; see blockhost-provisioner-doctor")));
        }
    }

    fn volumes(&mut self, document: &Document) {
        let look = self.look;
        let pool = &self.host.settings.storage_pool;
        let Ok(volumes) = &look.volumes else { return };
        let names: BTreeSet<&str> = volumes.iter().map(|(name, _)| name.as_str()).collect();
        for volume in &names {
            let Some(vm) = named_after(volume) else { continue };
            let file = look.pool_path.join(volume);
            let claimed = look
                .journals
                .iter()
                .flat_map(|(_, journal)| journal.iter())
                .any(|journal| journal.volumes.iter().any(|claimed| claimed.name == *volume));
            let record = document.raw_record(&vm);
            let alive = record.is_some_and(Document::stands_for_a_vm) || look.survey.domain(vm.as_str()).is_some();
            // An ISO alone may be anybody's.
            let own = VolumeNames::of(&vm);
            let ours = record.is_some() || !volume.ends_with(".iso") || names.contains(own.overlay.as_str());
            if claimed || alive || !ours || !self.is_free(vm.as_str()) || look.survey.in_use.used_by_other(&file, "") {
                continue;
            }
            let finding = Finding::new(
                Kind::OrphanedVolume,
                Some(vm.as_str()),
                *volume,
                format!("it is named as a volume of {vm}, which does not exist"),
            );
            self.add(if record.is_some() {
                finding.operator(format!("blockhost-vm-destroy {vm} removes what is left of it"))
            } else {
                finding.operator(format!(
                    "look at what it is; if nobody needs it: virsh vol-delete --pool {pool} {volume}"
                ))
            });
        }
    }

    /// Disks whose base is gone, of VMs that exist.
    fn bases(&mut self) {
        let look = self.look;
        let mut gone: BTreeSet<(&str, &Path)> = BTreeSet::new();
        for (volume, backing) in look.volumes.iter().flatten() {
            let vm = look.survey.domains.iter().find(|domain| {
                domain.facts.files.contains(&look.pool_path.join(volume)) && look.is_own(self.host, domain)
            });
            gone.extend(vm.zip(backing.as_deref()).map(|(vm, backing)| (vm.name(), backing)));
        }
        for domain in look.survey.domains.iter().filter(|domain| look.is_own(self.host, domain)) {
            gone.extend(domain.facts.bases.iter().map(|base| (domain.name(), base.as_path())));
        }
        for (vm, base) in gone {
            if look.gone.contains(base) && self.is_free(vm) {
                let base = base.display().to_string();
                let what =
                    "its disk is an overlay of this file, which is gone: it cannot start, and its data cannot be read";
                self.add(Finding::new(Kind::BaseMissing, Some(vm), &base, what).operator(format!(
                    "restore {base} from a backup, the very same file; while the VM runs, its QEMU still has it open: do not stop it, and copy it from /proc/PID/fd"
                )));
            }
        }
    }

    fn stale_routes(&mut self, document: &Document) {
        let pool = self.host.settings.broker.as_ref().ok().and_then(|broker| broker.ipv6_pool.as_ref());
        let Some(pool) = pool else { return };
        let unknown = self.look.unknown_holder(self.host);
        let Some(links) = &self.look.links else { return };
        let both: BTreeSet<_> = links.routes.iter().chain(links.neighbours.keys()).copied().collect();
        for address in both.into_iter().filter(|address| pool.contains(*address)) {
            let owned = document.holder_of("", address.into()).is_some()
                || self.look.claims.contains(&address.into())
                || self.look.survey.in_use.addresses.contains(&address.into());
            if owned {
                continue;
            }
            let bridge = &self.host.settings.bridge;
            let (kind, what) = if links.routes.contains(&address) {
                (Kind::StaleRoute, format!("the host routes {address} to {bridge}, and no VM has it"))
            } else {
                (Kind::StaleNeighbour, format!("the host ties {address} to a MAC address, and no VM has it"))
            };
            let finding = Finding::new(kind, None, address.to_string(), what);
            match &unknown {
                Some(_) if self.look.creating == Some(true) => {}
                Some(why) => self.add(finding.operator(format!("it is not removed while {why}"))),
                None => self.add(finding.applies(Mend::RemoveEntries(address), "removes it")),
            }
        }
    }
}

/// The VM a volume is named after.
fn named_after(volume: &str) -> Option<VmName> {
    let stem = [".qcow2", ".iso", ".console.log"].iter().find_map(|suffix| volume.strip_suffix(suffix)).or_else(|| {
        let (log, number) = volume.rsplit_once('.')?;
        let rotated = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
        log.strip_suffix(".console.log").filter(|_| rotated)
    });
    VmName::new(stem?).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_named_after_one_vm() {
        let vm = |volume: &str| named_after(volume).map(|vm| vm.to_string());
        for volume in ["web.1.qcow2", "web.1.iso", "web.1.console.log", "web.1.console.log.0"] {
            assert_eq!(vm(volume).as_deref(), Some("web.1"), "{volume}");
        }
        for volume in ["web.raw", "web.console.log.", "web.console.log.x", ".qcow2", "a b.qcow2", "web.log.1"] {
            assert_eq!(vm(volume), None, "{volume}");
        }
    }
}
