//! Creating a VM: a saga of steps, each covered by the intent journal before it acts, each undone on failure.
//!
//! One journal entry, written when the address is chosen and before anything else happens, says all that may exist:
//! volumes have names that follow from the VM's, the domain's UUID is the creation id. So undoing needs no memory of how
//! far a create came: it is "ensure absent" for each thing, in reverse order, and is the same whether the process failed,
//! was told to stop, or died and another one finds the journal.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use provisioner_contract::{CreateResult, LoginName, NftId, Timestamp, VmName, WalletAddress};
use provisioner_contract::{NewRecord, RecordStatus};

use crate::database::{Database, Document};
use crate::failpoint;
use crate::host::Host;
use crate::host_route::mac_text;
use crate::journal::{Journal, Operation, PoolVolume};
use crate::libvirt::domain_xml::{DiskMode, DomainSpec, DomainType};
use crate::libvirt::filter::FilterRef;
use crate::libvirt::kvm;
use crate::libvirt::metadata::Metadata;
use crate::libvirt::volume::{Pool, VolumeNames};
use crate::libvirt::{Connection, InUse};
use crate::limits::Limits;
use crate::lock::{ProvisioningLock, VmLock};
use crate::removal::{self, Claims};
use crate::seed::SeedInput;
use crate::seed::cloud_init::{self, Guest, SecretKey};
use crate::seed::network_config::{Ipv6Network, Network};
use crate::seed::resolvers;
use crate::settings;
use crate::template::{self, Pinned, Template};
use crate::{Error, ErrorKind, Result, access, bridge, ready, recovery, throttle};

/// A stop or destroy of the same VM ends within this time, and a create that fails is lost for good: so it is waited for.
/// A create that is under way is not: it takes longer, and then the name is taken.
const LOCK_WAIT: Duration = Duration::from_secs(60);
const LOCK_WAIT_FOR_CREATE: Duration = Duration::from_secs(10);

/// Below this a pool is full: an overlay's metadata, a seed and a console log must fit with something left for the
/// guest's first boot.
const POOL_RESERVE: u64 = 256 << 20;

/// The largest of each size that is not taken for a slip of the finger, where the host itself sets no limit.
const MAX_DISK_GIB: u64 = 64 * 1024;
pub(crate) const MAX_EXPIRY_DAYS: u32 = 36_500;
/// A Debian guest does not get through its boot with less.
const MIN_MEMORY_MIB: u64 = 128;

/// What is asked for.
#[derive(Debug, Clone)]
pub struct CreateRequest {
    /// The VM's name, which becomes the domain's.
    pub name: VmName,
    /// Who pays.
    pub owner_wallet: WalletAddress,
    /// The subscription's token, when it is known.
    pub nft_token_id: Option<NftId>,
    /// Days until expiry; the configured default when absent.
    pub expiry_days: Option<u32>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Disk in GiB.
    pub disk_gib: u64,
    /// The login user.
    pub username: LoginName,
    /// User-data to take byte for byte instead of the rendered template.
    pub user_data: Option<PathBuf>,
    /// Limits from its first start on, and what `--reset` returns to.
    pub limits: Limits,
}

impl CreateRequest {
    fn check(&self, host: &Host) -> Result<u32> {
        let invalid = |what: String| Err(Error::new(ErrorKind::Invalid, what));
        // Engines take a process whose command line shows this for a create under way, and QEMU's shows the VM's name.
        if self.name.as_str().contains("blockhost-vm-create") {
            return invalid(format!(
                "a VM cannot be called {}: engines would take it for a create under way",
                self.name
            ));
        }
        let days = self.expiry_days.unwrap_or(host.settings.default_expiry_days);
        if !(1..=MAX_EXPIRY_DAYS).contains(&days) {
            return invalid(format!("expiry of {days} days is not between 1 and {MAX_EXPIRY_DAYS}"));
        }
        if self.vcpus == 0 {
            return invalid("a VM needs at least 1 vCPU".into());
        }
        if self.memory_mib < MIN_MEMORY_MIB {
            return invalid(format!("memory of {} MB is below the minimum of {MIN_MEMORY_MIB}", self.memory_mib));
        }
        if !(1..=MAX_DISK_GIB).contains(&self.disk_gib) {
            return invalid(format!("disk of {} GB is not between 1 and {MAX_DISK_GIB}", self.disk_gib));
        }
        self.limits.check()?;
        if let Some(warning) = host.settings.address_warning(&self.owner_wallet) {
            host.progress.warn(&warning);
        }
        Ok(days)
    }

    fn result(&self, ipv4: Ipv4Addr, ipv6: Option<Ipv6Addr>) -> CreateResult {
        CreateResult::new(self.name.clone(), ipv4, ipv6, self.nft_token_id.clone(), self.username.clone())
    }
}

/// What `create` would do. Nothing is written, allocated or locked.
///
/// # Errors
/// Whatever would make the create fail before its first effect.
pub fn plan(host: &Host, request: &CreateRequest) -> Result<CreateResult> {
    request.check(host)?;
    let connection = host.connect()?;
    let prepared = Prepared::new(host, &connection, request, false)?;
    let document = host.database().read()?;
    if let Some(journal) = Journal::load(&host.dirs, &request.name)?
        && journal.owner.is_alive()
    {
        return Err(taken(&request.name, "is being worked on by another command"));
    }
    refuse_existing(&document, &connection, &request.name)?;
    leftovers(host, &prepared.pool, &request.name)?;
    let claims = Claims::new(host, &request.name, &prepared.in_use)?;
    let (ipv4, ipv6) = next_addresses(host, &document, &claims)?;
    Ok(request.result(ipv4, ipv6))
}

/// The same against a database file alone: no hypervisor, no locks but the database's own.
///
/// # Errors
/// When the name is taken, a pool is exhausted or the file cannot be used.
pub fn mock(host: &Host, database: &Database, request: &CreateRequest, apply: bool) -> Result<CreateResult> {
    let days = request.check(host)?;
    let claims = Claims::default();
    if !apply {
        let document = database.read()?;
        refuse_record(&document, &request.name)?;
        let (ipv4, ipv6) = next_addresses(host, &document, &claims)?;
        return Ok(request.result(ipv4, ipv6));
    }
    database.update(|document| {
        refuse_record(document, &request.name)?;
        let (ipv4, ipv6) = allocate_addresses(host, document, &claims)?;
        let mode = host.settings.network_mode.as_deref().unwrap_or("mock");
        document.register(&new_record(request, ipv4, ipv6, mode, Timestamp::now(), days))?;
        Ok(request.result(ipv4, ipv6))
    })
}

/// Creates the VM, waits until it can be handed over, and hands the result to `deliver`, which writes it to whoever asked.
/// A result that cannot be delivered is a failure like any other.
///
/// # Errors
/// Any failure, after everything was undone. Should undoing fail too, the error says so and the next command for the
/// name, and every gc, tries again.
pub fn create(
    host: &Host,
    request: &CreateRequest,
    deliver: &dyn Fn(&CreateResult) -> io::Result<()>,
) -> Result<CreateResult> {
    let days = request.check(host)?;
    let begin = Instant::now();
    let _provisioning = ProvisioningLock::enter(&host.dirs, &*host.progress);
    let lock = lock(host, &request.name)?;
    recovery::recover(host, &request.name, &lock)?;

    host.progress.phase("checking the host");
    let connection = host.reconnect()?;
    refuse_existing(&host.database().read()?, &connection, &request.name)?;
    let prepared = Prepared::new(host, &connection, request, true)?;
    clear_leftovers(host, &prepared.pool, &request.name)?;

    let mut saga = Saga::new(host, &connection, request, prepared, days)?;
    let outcome =
        saga.run().and_then(|()| saga.commit()).and_then(|result| saga.deliver(&result, deliver).map(|()| result));
    match outcome {
        Ok(result) => {
            host.progress.note(&format!("{} is ready after {:.1} s", request.name, begin.elapsed().as_secs_f64()));
            Ok(result)
        }
        Err(error) => Err(saga.fail(error)),
    }
}

fn lock(host: &Host, name: &VmName) -> Result<VmLock> {
    let acquire = |wait| VmLock::acquire(&host.dirs, name, wait, &host.cancel, &host.command);
    match acquire(LOCK_WAIT_FOR_CREATE) {
        Err(error) if error.kind == ErrorKind::Busy => match VmLock::holder(&host.dirs, name) {
            Some(holder) if holder.command == host.command => Err(error),
            _ => acquire(LOCK_WAIT - LOCK_WAIT_FOR_CREATE),
        },
        outcome => outcome,
    }
}

fn too_small(disk_gib: u64, template: u64) -> Error {
    let needed = template.div_ceil(1 << 30);
    let what = format!("a disk of {disk_gib} GB is smaller than the template, which needs {needed} GB");
    Error::new(ErrorKind::Invalid, what)
}

fn taken(name: &VmName, why: &str) -> Error {
    Error::new(ErrorKind::Conflict, format!("a VM called {name} {why}"))
}

fn refuse_record(document: &Document, name: &VmName) -> Result<()> {
    match document.record(name)? {
        Some(record) if record.is_live() => {
            Err(taken(name, &format!("exists already: its record is {}", record.status.as_str())))
        }
        _ => Ok(()),
    }
}

fn refuse_existing(document: &Document, connection: &Connection, name: &VmName) -> Result<()> {
    refuse_record(document, name)?;
    if connection.domain(name)?.is_some() {
        return Err(taken(name, "exists already: libvirt has a domain of that name"));
    }
    Ok(())
}

/// The volumes with our names that are there without a domain. After a destroy that could not delete them they must not
/// block the name; without any record of such a VM they may be somebody's data.
///
/// Whatever is there must be known before the journal is written: from then on an undo deletes what stands in it.
fn leftovers(host: &Host, pool: &Pool, name: &VmName) -> Result<Vec<String>> {
    let names = VolumeNames::of(name);
    let mut found = Vec::new();
    for volume in names.all() {
        if pool.is_taken(volume)? {
            found.push(volume.to_owned());
        }
    }
    match found.first() {
        Some(volume) if host.database().read()?.raw_record(name).is_none() => Err(Error::new(
            ErrorKind::Conflict,
            format!("storage pool {:?} has a volume {volume:?}, but no VM called {name} is known", pool.name()),
        )
        .hint(format!("if nobody needs it: virsh vol-delete --pool {} {volume}", pool.name()))),
        _ => Ok(found),
    }
}

fn clear_leftovers(host: &Host, pool: &Pool, name: &VmName) -> Result<()> {
    for volume in leftovers(host, pool, name)? {
        host.progress.note(&format!("deleting volume {volume:?}, left of the destroyed VM {name}"));
        pool.ensure_absent(&volume)?;
    }
    Ok(())
}

fn new_record(
    request: &CreateRequest,
    ipv4: Ipv4Addr,
    ipv6: Option<Ipv6Addr>,
    network_mode: &str,
    created_at: Timestamp,
    days: u32,
) -> NewRecord {
    NewRecord {
        vm_name: request.name.clone(),
        vmid: 0,
        ip_address: ipv4,
        ipv6_address: ipv6,
        expires_at: created_at.plus_days(days),
        owner: request.owner_wallet.to_string(),
        status: RecordStatus::Active,
        created_at,
        purpose: String::new(),
        wallet_address: request.owner_wallet.clone(),
        username: request.username.clone(),
        network_mode: network_mode.to_owned(),
    }
}

fn next_addresses(host: &Host, document: &Document, claims: &Claims) -> Result<(Ipv4Addr, Option<Ipv6Addr>)> {
    let claimed4 = |address: Ipv4Addr| claims.contain(address.into());
    let claimed6 = |address: Ipv6Addr| claims.contain(address.into());
    let ipv4 = document.next_ipv4(host.settings.require_ipv4_pool()?, &claimed4)?;
    let ipv6 = host.settings.require_broker()?.ipv6_pool.as_ref();
    Ok((ipv4, ipv6.map(|pool| document.next_ipv6(pool, &claimed6)).transpose()?))
}

fn allocate_addresses(host: &Host, document: &mut Document, claims: &Claims) -> Result<(Ipv4Addr, Option<Ipv6Addr>)> {
    let claimed4 = |address: Ipv4Addr| claims.contain(address.into());
    let claimed6 = |address: Ipv6Addr| claims.contain(address.into());
    let ipv4 = document.allocate_ipv4(host.settings.require_ipv4_pool()?, &claimed4)?;
    let ipv6 = host.settings.require_broker()?.ipv6_pool.as_ref();
    Ok((ipv4, ipv6.map(|pool| document.allocate_ipv6(pool, &claimed6)).transpose()?))
}

/// Everything that can be found out, and can be wrong, before the first effect.
struct Prepared {
    pool: Pool,
    template: Template,
    /// Held until the overlay exists: until then nothing else says that the template is in use.
    pin: Option<Pinned>,
    network_mode: String,
    gateway: Option<Ipv4Addr>,
    domain_type: DomainType,
    disk_mode: DiskMode,
    user_data: UserData,
    nameservers: Vec<IpAddr>,
    in_use: InUse,
}

impl Prepared {
    fn new(host: &Host, connection: &Connection, request: &CreateRequest, apply: bool) -> Result<Self> {
        let settings = &host.settings;
        let network_mode = settings.require_network_mode()?.to_owned();
        let ipv4_pool = settings.require_ipv4_pool()?;
        settings.require_broker()?;
        settings.require_otp()?;
        let template = template::current(&host.dirs)?;
        let disk = request.disk_gib << 30;
        let user_data = match &request.user_data {
            Some(file) => UserData::Own(cloud_init::read_user_data(file)?),
            None => UserData::Template(cloud_init::read_template(&cloud_init::template_dirs(&host.dirs))?),
        };
        let pool = connection.pool(&settings.storage_pool)?;
        let filesystem = nix::sys::statvfs::statvfs(pool.target()).ok();
        if let Some(space) = &filesystem
            && space.blocks_available() * space.fragment_size() <= POOL_RESERVE
        {
            return Err(Error::new(
                ErrorKind::Exhausted,
                format!("storage pool {:?} is full: less than {} MB are free", pool.name(), POOL_RESERVE >> 20),
            ));
        }
        let bridge = bridge::look_up(&settings.bridge)?;
        let gateway = ipv4_pool.gateway.or_else(|| bridge.address_in(ipv4_pool.network, ipv4_pool.prefix_len));
        if gateway.is_none() {
            host.progress.warn(&format!(
                "neither ip_pool.gateway nor an address on bridge {} is known: the VM gets no default route",
                settings.bridge
            ));
        }
        if let Some(user) = access::barred_from_kvm(connection)? {
            host.progress.warn(&format!(
                "{} is there, and QEMU's user {user} cannot open it: VMs run under emulation, and every question to libvirt takes seconds; {}",
                access::KVM,
                access::KVM_REMEDY
            ));
        }
        let domain_type = match settings.libvirt.domain_type {
            settings::DomainType::Kvm => DomainType::Kvm,
            settings::DomainType::Qemu => DomainType::Qemu,
            // A plan starts nothing, not even a probe.
            settings::DomainType::Auto if !apply => DomainType::Qemu,
            settings::DomainType::Auto => {
                kvm::choose(connection, &template.path, &host.dirs.kvm_answer(), &*host.progress, &host.cancel)?
            }
        };
        // Chosen for good only now: the probe takes a while, and a pin keeps old templates from being removed.
        let (template, pin) = if apply {
            let pin = template::pin(&host.dirs)?;
            (pin.template.clone(), Some(pin))
        } else {
            (template, None)
        };
        if disk < template.virtual_size {
            return Err(too_small(request.disk_gib, template.virtual_size));
        }
        let max_vcpus = connection.max_vcpus(domain_type.as_str())?;
        if request.vcpus > max_vcpus {
            let what = format!("{} vCPUs are more than the {max_vcpus} this hypervisor allows", request.vcpus);
            return Err(Error::new(ErrorKind::Invalid, what));
        }
        let host_memory = connection.host_memory_mib()?;
        if request.memory_mib > host_memory {
            let what = format!("{} MB of memory are more than the host's {host_memory}", request.memory_mib);
            return Err(Error::new(ErrorKind::Invalid, what));
        }
        let magic = nix::sys::statfs::statfs(pool.target()).ok().map(|fs| fs.filesystem_type().0);
        let nameservers = match settings.libvirt.nameservers.as_slice() {
            [] => resolvers::host_resolvers(&resolvers::RESOLV_CONF)?,
            configured => configured.to_vec(),
        };
        if nameservers.is_empty() {
            host.progress
                .warn("no name servers are known: set libvirt.nameservers in db.yaml, or the VM resolves no names");
        }
        Ok(Self {
            pool,
            template,
            pin,
            network_mode,
            gateway,
            domain_type,
            disk_mode: DiskMode::for_filesystem(magic),
            user_data,
            nameservers,
            in_use: InUse::of(connection)?,
        })
    }
}

/// Where the guest's user-data comes from.
enum UserData {
    /// The base package's template, to be filled in.
    Template(String),
    /// The caller's file, byte for byte.
    Own(Vec<u8>),
}

/// One step of the saga: its name, which is also its failpoint, and its effect.
type Step<'a> = (&'static str, fn(&mut Saga<'a>) -> Result<()>);

/// The points at which a test can stop a create, in their order. The step of the same name has just had its effect.
pub const FAILPOINTS: &[&str] = &[
    "create.begin",
    "create.journal",
    "create.address",
    "create.overlay",
    "create.seed",
    "create.console",
    "create.filter",
    "create.define",
    "create.start",
    "create.autostart",
    "create.route",
    "create.ready",
    "create.register",
];

/// The points at which a test can stop the undoing of a create.
pub const UNDO_FAILPOINTS: &[&str] =
    &["undo.begin", "undo.record", "undo.domain", "undo.volumes", "undo.route", "undo.address"];

struct Saga<'a> {
    host: &'a Host,
    connection: &'a Connection,
    request: &'a CreateRequest,
    prepared: Prepared,
    journal: Journal,
    created_at: Timestamp,
    days: u32,
    mac: [u8; 6],
    /// Whether the journal is on disk, and with it something to undo.
    begun: bool,
    domain: Option<crate::libvirt::Domain>,
    volumes: VolumeNames,
}

impl<'a> Saga<'a> {
    fn steps() -> [Step<'a>; 11] {
        [
            ("create.address", Self::allocate),
            ("create.overlay", Self::make_overlay),
            ("create.seed", Self::make_seed),
            ("create.console", Self::make_console),
            ("create.filter", Self::ensure_filter),
            ("create.define", Self::define),
            ("create.start", Self::start),
            ("create.autostart", Self::set_autostart),
            ("create.route", Self::add_route),
            ("create.ready", Self::wait_until_ready),
            ("create.register", Self::register),
        ]
    }

    fn new(
        host: &'a Host,
        connection: &'a Connection,
        request: &'a CreateRequest,
        prepared: Prepared,
        days: u32,
    ) -> Result<Self> {
        let volumes = VolumeNames::of(&request.name);
        let (creation_id, mac) = identity(&prepared.in_use);
        let bridge = &host.settings.bridge;
        let mut journal = Journal::begin(Operation::Create, &request.name, &host.command, &creation_id, bridge)?;
        let pool = prepared.pool.name().to_owned();
        journal.volumes = volumes.all().map(|name| PoolVolume { pool: pool.clone(), name: name.to_owned() }).to_vec();
        journal.domain_uuid = Some(creation_id);
        // The record's creation time is the journal's: that is how an undo knows the record as its own.
        let created_at = journal.started_at;
        Ok(Self {
            host,
            connection,
            request,
            prepared,
            journal,
            created_at,
            days,
            mac,
            begun: false,
            domain: None,
            volumes,
        })
    }

    fn run(&mut self) -> Result<()> {
        failpoint::hit("create.begin")?;
        for (name, effect) in Self::steps() {
            self.host.cancel.check()?;
            effect(self)?;
            failpoint::hit(name)?;
        }
        self.host.cancel.check()
    }

    /// The addresses, chosen and journalled under the database's lock: a second create sees either the allocation or
    /// the journal.
    fn allocate(&mut self) -> Result<()> {
        self.host.progress.phase("allocating an address");
        let host = self.host;
        host.database().update(|document| {
            refuse_record(document, &self.request.name)?;
            // Asked anew under the lock: a VM made meanwhile may have lost its record already.
            let claims = Claims::new(host, &self.request.name, &InUse::of(self.connection)?)?;
            let (ipv4, ipv6) = allocate_addresses(host, document, &claims)?;
            self.journal.ipv4 = Some(ipv4);
            self.journal.ipv6 = ipv6;
            // Before it is stored: a store that fails at its last step may have left it there.
            self.begun = true;
            self.journal.store(&host.dirs)?;
            failpoint::hit("create.journal")
        })
    }

    fn addresses(&self) -> Result<(Ipv4Addr, Option<Ipv6Addr>)> {
        let ipv4 = self.journal.ipv4.ok_or_else(|| Error::new(ErrorKind::Io, "no address was allocated"))?;
        Ok((ipv4, self.journal.ipv6))
    }

    fn creation_id(&self) -> &str {
        &self.journal.creation_id
    }

    /// Makes sure that the volume about to be made is not somebody's who has just come: then it is struck from the
    /// journal, so that no undo deletes it.
    fn claim_volume(&mut self, volume: &str) -> Result<()> {
        if !self.prepared.pool.is_taken(volume)? {
            return Ok(());
        }
        self.journal.volumes.retain(|journalled| journalled.name != volume);
        self.journal.store(&self.host.dirs)?;
        let what = format!("storage pool {:?} has got a volume {volume:?} meanwhile", self.prepared.pool.name());
        Err(Error::new(ErrorKind::Conflict, what).hint("it was not touched; see who made it"))
    }

    fn make_overlay(&mut self) -> Result<()> {
        self.host.progress.phase("making the disk");
        self.claim_volume(&self.volumes.overlay.clone())?;
        let capacity = self.request.disk_gib << 30;
        self.prepared.pool.create_overlay(&self.volumes.overlay, capacity, &self.prepared.template.path)?;
        self.prepared.pin = None;
        Ok(())
    }

    fn make_seed(&mut self) -> Result<()> {
        self.claim_volume(&self.volumes.seed.clone())?;
        let (ipv4, ipv6) = self.addresses()?;
        let (request, settings, prepared) = (self.request, &self.host.settings, &self.prepared);
        let user_data = match &prepared.user_data {
            UserData::Own(bytes) => bytes.clone(),
            UserData::Template(template) => Guest {
                name: &request.name,
                ipv4,
                ipv6,
                username: &request.username,
                wallet: &request.owner_wallet,
                nft: request.nft_token_id.as_ref(),
                otp_length: settings.require_otp()?.length,
                otp_ttl_seconds: settings.require_otp()?.ttl_seconds.into(),
                dns_zone: settings.require_broker()?.dns_zone.as_deref(),
                secret_key: &SecretKey::random()?,
            }
            .render(template)?
            .into_bytes(),
        };
        let ipv6 = ipv6.zip(settings.require_broker()?.ipv6_pool.as_ref());
        let network = Network {
            mac: self.mac,
            address: ipv4,
            prefix_len: settings.require_ipv4_pool()?.prefix_len,
            gateway: prepared.gateway,
            name_servers: prepared.nameservers.clone(),
            ipv6: ipv6.map(|(address, pool)| Ipv6Network { address, router: pool.router() }),
        };
        let seed = SeedInput {
            instance_id: self.creation_id(),
            name: &request.name,
            user_data: &user_data,
            network: &network,
            created: self.created_at.as_jiff(),
        }
        .image()?;
        self.prepared.pool.create_filled(&self.volumes.seed, &seed).map(drop)
    }

    /// A volume like the others, so that libvirt deletes it: the service user could not.
    fn make_console(&mut self) -> Result<()> {
        self.claim_volume(&self.volumes.console.clone())?;
        self.prepared.pool.create_empty(&self.volumes.console).map(drop)
    }

    fn filter(&self) -> Result<FilterRef> {
        let (ipv4, ipv6) = self.addresses()?;
        Ok(FilterRef::new(self.mac, ipv4, ipv6))
    }

    fn ensure_filter(&mut self) -> Result<()> {
        self.connection.ensure_filter(&self.filter()?)
    }

    fn define(&mut self) -> Result<()> {
        self.host.progress.phase("defining the domain");
        let (ipv4, ipv6) = self.addresses()?;
        let pool = &self.prepared.pool;
        let metadata = Metadata {
            name: self.request.name.clone(),
            creation_id: self.creation_id().to_owned(),
            created_at: self.created_at.to_string(),
            expires_at: self.created_at.plus_days(self.days).to_string(),
            wallet_address: self.request.owner_wallet.clone(),
            nft_token_id: self.request.nft_token_id.clone(),
            username: self.request.username.clone(),
            network_mode: self.prepared.network_mode.clone(),
            ipv4,
            ipv6,
            mac: mac_text(self.mac),
            limits: self.request.limits,
        };
        let xml = DomainSpec {
            metadata: &metadata,
            domain_type: self.prepared.domain_type,
            vcpus: self.request.vcpus,
            memory_mib: self.request.memory_mib,
            overlay: &pool.path(&self.volumes.overlay),
            base: &self.prepared.template.path,
            seed: &pool.path(&self.volumes.seed),
            console: &pool.path(&self.volumes.console),
            bridge: &self.host.settings.bridge,
            filter: &self.filter()?,
            disk_mode: self.prepared.disk_mode,
        }
        .to_xml();
        let domain = self.domain.insert(self.connection.define(&self.request.name, &xml)?);
        throttle::apply_at_creation(domain, &self.request.limits)
    }

    fn defined(&self) -> Result<&crate::libvirt::Domain> {
        self.domain.as_ref().ok_or_else(|| Error::new(ErrorKind::NotFound, "no domain was defined"))
    }

    fn start(&mut self) -> Result<()> {
        self.host.progress.phase("starting the domain");
        self.defined()?.start()
    }

    fn set_autostart(&mut self) -> Result<()> {
        self.defined()?.set_autostart(true)
    }

    fn add_route(&mut self) -> Result<()> {
        if let Some(address) = self.journal.ipv6 {
            self.host.ensure_reachable(&self.host.settings.bridge, address, Some(self.mac));
        }
        Ok(())
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let (pool, console) = (&self.prepared.pool, &self.volumes.console);
        ready::Awaited {
            name: &self.request.name,
            user: &self.request.username,
            own_user_data: self.request.user_data.is_some(),
            emulated: self.prepared.domain_type == DomainType::Qemu,
            console: &|| Ok(ready::last_line(&pool.tail(console, ready::CONSOLE_TAIL)?)),
        }
        .wait(self.host)
    }

    fn register(&mut self) -> Result<()> {
        self.host.progress.phase("registering the VM");
        let (ipv4, ipv6) = self.addresses()?;
        let mode = &self.prepared.network_mode;
        let record = new_record(self.request, ipv4, ipv6, mode, self.created_at, self.days);
        self.host.database().update(|document| {
            // What undoing has to put back must be on disk before the record it replaces is gone.
            let replaced = document.raw_record(&self.request.name).cloned();
            if self.journal.replaced_record != replaced {
                self.journal.replaced_record = replaced;
                self.journal.store(&self.host.dirs)?;
            }
            document.register(&record).map(drop)
        })
    }

    /// The point of no return: with its journal gone the VM stays. Only then is the result printed; a process that dies
    /// in between leaves a registered, working VM whose create was not reported.
    fn commit(&mut self) -> Result<CreateResult> {
        let (ipv4, ipv6) = self.addresses()?;
        Journal::remove(&self.host.dirs, &self.request.name)?;
        self.begun = false;
        Ok(self.request.result(ipv4, ipv6))
    }

    /// After the point of no return, so that a process killed in between does not lose a VM that was reported. A result
    /// nobody could take brings the journal back, and with it the undo.
    fn deliver(&mut self, result: &CreateResult, deliver: &dyn Fn(&CreateResult) -> io::Result<()>) -> Result<()> {
        deliver(result).map_err(|cause| {
            self.begun = true;
            let error = Error::new(ErrorKind::Io, "cannot deliver the result").because(cause);
            match self.journal.store(&self.host.dirs) {
                Ok(()) => error,
                Err(journal) => {
                    self.host.progress.warn(&format!("the undo goes on without a journal: {}", journal.in_full()));
                    error
                }
            }
        })
    }

    /// Undoes what was begun and returns the error to report.
    fn fail(self, error: Error) -> Error {
        if !self.begun {
            return error;
        }
        self.host.progress.phase(&format!("undoing: {error}"));
        match undo(self.host, &self.journal) {
            Ok(()) => error,
            Err(undo) => {
                let name = &self.request.name;
                self.host.progress.warn(&format!("cannot undo the create of {name} now: {}", undo.in_full()));
                let next = format!(
                    "what is left of {name} is removed by the next command for it, such as blockhost-vm-destroy {name}, or by blockhost-vm-gc"
                );
                let hint = error.hint.clone().map_or_else(|| next.clone(), |hint| format!("{hint}; {next}"));
                error.hint(hint)
            }
        }
    }
}

/// A fresh creation id and the MAC address that follows from it, which no defined domain has.
fn identity(in_use: &InUse) -> (String, [u8; 6]) {
    loop {
        let id = uuid::Uuid::new_v4();
        let [a, b, c, ..] = *id.as_bytes();
        let mac = [0x52, 0x54, 0x00, a, b, c];
        if !in_use.macs.contains(&mac_text(mac)) {
            return (id.to_string(), mac);
        }
    }
}

/// Removes everything the create behind `journal` may have made, and then the journal. Signals do not stop it.
///
/// # Errors
/// At the first thing that cannot be removed; what comes later in the order stays with it. A domain that cannot be
/// stopped so keeps its disk and its addresses.
pub(crate) fn undo(host: &Host, journal: &Journal) -> Result<()> {
    let name = &journal.vm_name;
    failpoint::hit("undo.begin")?;
    host.database().update(|document| match document.record(name) {
        // Only the record this very create has registered.
        Ok(Some(record)) if record.created_at == Some(journal.started_at) => {
            document.unregister(name, journal.replaced_record.as_ref())
        }
        _ => Ok(()),
    })?;
    failpoint::hit("undo.record")?;
    let connection = host.reconnect()?;
    removal::domain(&connection, name, journal.domain_uuid.as_deref())?;
    failpoint::hit("undo.domain")?;
    let in_use = removal::volumes(&connection, journal)?;
    failpoint::hit("undo.volumes")?;
    // Last of the things that can fail for want of somebody's help: without the root agent only the route and the address
    // that belongs to it stay.
    removal::route(host, journal)?;
    failpoint::hit("undo.route")?;
    host.database().update(|document| {
        let claims = Claims::new(host, name, &in_use)?;
        document.release_addresses(name, journal.ipv4, journal.ipv6, &|address| claims.contain(address))
    })?;
    failpoint::hit("undo.address")?;
    removal::conclude(host, journal)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_avoids_the_macs_in_use() {
        let (id, mac) = identity(&InUse::default());
        assert_eq!(&mac[..3], [0x52, 0x54, 0]);
        assert_eq!(mac_text(mac).replace(':', "")[6..], id[..6]);
    }

    #[test]
    fn every_step_has_its_failpoint() {
        for (name, _) in Saga::steps() {
            assert!(FAILPOINTS.contains(&name), "{name}");
        }
    }
}
