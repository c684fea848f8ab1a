//! The few libvirt calls the safe wrapper lacks or gets wrong, and the only unsafe code of the suite.
//!
//! The wrapper's `all_domain_stats` gives no fields and leaks its list; its `Domain::state` drops the error of
//! a failed call and then reports a state that is none.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_int, c_uint};
use std::ptr;

use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;

/// `virDomainGetState`: the raw `virDomainState` number.
pub(super) fn domain_state(domain: &Domain) -> Result<u32, Error> {
    let mut state: c_int = -1;
    // SAFETY: `as_ptr` is a live reference for as long as `domain` is borrowed; `state` outlives the call; libvirt
    // takes NULL for the reason it is not asked for.
    let answer = unsafe { virt_sys::virDomainGetState(domain.as_ptr(), &raw mut state, ptr::null_mut(), 0) };
    match u32::try_from(state) {
        Ok(state) if answer == 0 => Ok(state),
        _ => Err(Error::last_error()),
    }
}

/// `virConnectGetAllDomainStats` for the state group alone: name and raw `virDomainState` of every domain, in one
/// round trip that enters no QEMU monitor.
pub(super) fn all_domain_states(conn: &Connect) -> Result<Vec<(String, u32)>, Error> {
    let mut records: *mut virt_sys::virDomainStatsRecordPtr = ptr::null_mut();
    // SAFETY: `as_ptr` is live while `conn` is borrowed; `records` receives a NULL-terminated array of libvirt's,
    // freed below on the only path on which it was allocated.
    let count = unsafe {
        virt_sys::virConnectGetAllDomainStats(conn.as_ptr(), virt_sys::VIR_DOMAIN_STATS_STATE, &raw mut records, 0)
    };
    let Ok(count) = usize::try_from(count) else {
        return Err(Error::last_error());
    };
    let mut states = Vec::with_capacity(count);
    for index in 0..count {
        // SAFETY: libvirt returned `count` records, each a valid pointer with a live domain and `nparams` parameters
        // until the list is freed; the name is copied out at once.
        unsafe {
            let record = *records.add(index);
            let name = virt_sys::virDomainGetName((*record).dom);
            let mut state: c_int = -1;
            let found = virt_sys::virTypedParamsGetInt(
                (*record).params,
                (*record).nparams,
                c"state.state".as_ptr(),
                &raw mut state,
            );
            if let (false, 1, Ok(state)) = (name.is_null(), found, u32::try_from(state)) {
                states.push((CStr::from_ptr(name).to_string_lossy().into_owned(), state));
            }
        }
    }
    // SAFETY: `records` came from the call above, is freed once, and nothing borrowed from it is left.
    unsafe { virt_sys::virDomainStatsRecordListFree(records) };
    Ok(states)
}

/// A typed parameter to set. The type must be the one libvirt names for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value {
    /// `VIR_TYPED_PARAM_UINT`.
    UInt(u32),
    /// `VIR_TYPED_PARAM_LLONG`.
    LLong(i64),
    /// `VIR_TYPED_PARAM_ULLONG`.
    ULLong(u64),
}

/// One parameter by libvirt's name.
pub(super) type Parameter = (&'static CStr, Value);

/// A list of typed parameters in libvirt's memory.
struct Parameters {
    list: virt_sys::virTypedParameterPtr,
    used: c_int,
    room: c_int,
}

impl Parameters {
    fn new(parameters: &[Parameter]) -> Result<Self, Error> {
        let mut all = Self { list: ptr::null_mut(), used: 0, room: 0 };
        for (name, value) in parameters {
            let (list, used, room) = (&raw mut all.list, &raw mut all.used, &raw mut all.room);
            // SAFETY: the three pointers are to the fields of one list that only these functions change, starting as
            // NULL, 0, 0, as they ask for; the name is a C string that they copy.
            let answer = unsafe {
                match *value {
                    Value::UInt(n) => virt_sys::virTypedParamsAddUInt(list, used, room, name.as_ptr(), n),
                    Value::LLong(n) => virt_sys::virTypedParamsAddLLong(list, used, room, name.as_ptr(), n),
                    Value::ULLong(n) => virt_sys::virTypedParamsAddULLong(list, used, room, name.as_ptr(), n),
                }
            };
            if answer != 0 {
                return Err(Error::last_error());
            }
        }
        Ok(all)
    }
}

impl Drop for Parameters {
    fn drop(&mut self) {
        // SAFETY: `list` is NULL or was allocated by virTypedParamsAdd*, holds `used` parameters, and is freed once.
        unsafe { virt_sys::virTypedParamsFree(self.list, self.used) };
    }
}

/// A getter that takes room for parameters and its size, and says how much of it was filled, or would have been when
/// the size is 0.
type Getter<'a> = &'a dyn Fn(virt_sys::virTypedParameterPtr, *mut c_int) -> c_int;

/// Whole numbers by name. Values of other types are left out: nothing the suite asks for has one.
fn read_parameters(getter: Getter<'_>) -> Result<Vec<(String, i64)>, Error> {
    let mut count: c_int = 0;
    if getter(ptr::null_mut(), &raw mut count) != 0 {
        return Err(Error::last_error());
    }
    // SAFETY: the structure is numbers, an array of characters and a union of numbers and a pointer that is not read
    // before libvirt has filled it: all zeroes are a valid value.
    let empty: virt_sys::virTypedParameter = unsafe { std::mem::zeroed() };
    let mut room = vec![empty; usize::try_from(count).unwrap_or(0)];
    if getter(room.as_mut_ptr(), &raw mut count) != 0 {
        return Err(Error::last_error());
    }
    let filled = usize::try_from(count).unwrap_or(0).min(room.len());
    let mut all = Vec::with_capacity(filled);
    for parameter in &room[..filled] {
        // SAFETY: libvirt has filled this parameter: its name ends with a NUL inside the field, and its type says
        // which member of the union was written.
        unsafe {
            let name = CStr::from_ptr(parameter.field.as_ptr()).to_string_lossy().into_owned();
            let value = match u32::try_from(parameter.type_) {
                Ok(virt_sys::VIR_TYPED_PARAM_INT) => i64::from(parameter.value.i),
                Ok(virt_sys::VIR_TYPED_PARAM_UINT) => i64::from(parameter.value.ui),
                Ok(virt_sys::VIR_TYPED_PARAM_LLONG) => parameter.value.l,
                Ok(virt_sys::VIR_TYPED_PARAM_ULLONG) => i64::try_from(parameter.value.ul).unwrap_or(i64::MAX),
                _ => continue,
            };
            all.push((name, value));
        }
    }
    // SAFETY: frees the strings inside the filled parameters, once; the room itself is ours.
    unsafe { virt_sys::virTypedParamsClear(room.as_mut_ptr(), count) };
    Ok(all)
}

fn done(answer: c_int) -> Result<(), Error> {
    if answer == 0 { Ok(()) } else { Err(Error::last_error()) }
}

/// `virDomainGetSchedulerParametersFlags`.
pub(super) fn scheduler_parameters(domain: &Domain, flags: u32) -> Result<Vec<(String, i64)>, Error> {
    // This call, unlike its siblings, does not tell the number when it is asked with none.
    let (_, most) = domain.scheduler_type()?;
    read_parameters(&|list, count| {
        if list.is_null() {
            // SAFETY: `count` is a live number of `read_parameters`.
            unsafe { *count = most };
            return 0;
        }
        // SAFETY: the domain is live while it is borrowed; `list` has room for `*count` parameters.
        unsafe { virt_sys::virDomainGetSchedulerParametersFlags(domain.as_ptr(), list, count, flags) }
    })
}

/// `virDomainSetSchedulerParametersFlags`.
pub(super) fn set_scheduler_parameters(domain: &Domain, parameters: &[Parameter], flags: u32) -> Result<(), Error> {
    let all = Parameters::new(parameters)?;
    // SAFETY: the domain is live while it is borrowed; `all` holds `used` parameters until the end of this function.
    done(unsafe { virt_sys::virDomainSetSchedulerParametersFlags(domain.as_ptr(), all.list, all.used, flags) })
}

/// `virDomainGetInterfaceParameters`; `interface` is its MAC address or its name on the host.
pub(super) fn interface_parameters(domain: &Domain, interface: &CStr, flags: u32) -> Result<Vec<(String, i64)>, Error> {
    read_parameters(&|list, count| {
        // SAFETY: the domain is live while it is borrowed; `list` has room for `*count` parameters, or both are none.
        unsafe { virt_sys::virDomainGetInterfaceParameters(domain.as_ptr(), interface.as_ptr(), list, count, flags) }
    })
}

/// `virDomainSetInterfaceParameters`.
pub(super) fn set_interface_parameters(
    domain: &Domain,
    interface: &CStr,
    parameters: &[Parameter],
    flags: u32,
) -> Result<(), Error> {
    let all = Parameters::new(parameters)?;
    let interface = interface.as_ptr();
    // SAFETY: the domain is live while it is borrowed; `all` holds `used` parameters until the end of this function.
    done(unsafe { virt_sys::virDomainSetInterfaceParameters(domain.as_ptr(), interface, all.list, all.used, flags) })
}

/// `virDomainGetBlockIoTune`; `disk` is its target or its path.
pub(super) fn block_io_tune(domain: &Domain, disk: &CStr, flags: u32) -> Result<Vec<(String, i64)>, Error> {
    read_parameters(&|list, count| {
        // SAFETY: the domain is live while it is borrowed; `list` has room for `*count` parameters, or both are none.
        unsafe { virt_sys::virDomainGetBlockIoTune(domain.as_ptr(), disk.as_ptr(), list, count, flags) }
    })
}

/// `virDomainSetBlockIoTune`.
pub(super) fn set_block_io_tune(
    domain: &Domain,
    disk: &CStr,
    parameters: &[Parameter],
    flags: u32,
) -> Result<(), Error> {
    let all = Parameters::new(parameters)?;
    let disk = disk.as_ptr();
    // SAFETY: the domain is live while it is borrowed; `all` holds `used` parameters until the end of this function.
    done(unsafe { virt_sys::virDomainSetBlockIoTune(domain.as_ptr(), disk, all.list, all.used, flags) })
}

/// A value of a statistics record. Other types than these do not occur in the groups we ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Statistic {
    Number(u64),
    Text(String),
}

/// One domain's statistics: its name, and what libvirt says under which field.
pub(super) type Record = (String, Vec<(String, Statistic)>);

/// `virDomainListGetStats`: the statistics `groups` of `domains`, in one round trip. Domains that have gone are left out.
/// With `NOWAIT` in `flags` a domain that is busy comes without what QEMU would have to be asked for.
pub(super) fn stats(domains: &[&Domain], groups: u32, flags: u32) -> Result<Vec<Record>, Error> {
    if domains.is_empty() {
        return Ok(Vec::new());
    }
    // SAFETY: the pointers are used only below, while `domains` is borrowed.
    let mut list: Vec<virt_sys::virDomainPtr> = domains.iter().map(|domain| unsafe { domain.as_ptr() }).collect();
    list.push(ptr::null_mut());
    let mut records: *mut virt_sys::virDomainStatsRecordPtr = ptr::null_mut();
    // SAFETY: `list` is NULL-terminated, its pointers are live while `domains` is borrowed, and all are of one connection,
    // which is the caller's duty and else an error of libvirt's; `records` receives an array of libvirt's, freed below on
    // the only path on which it was allocated.
    let count = unsafe { virt_sys::virDomainListGetStats(list.as_mut_ptr(), groups, &raw mut records, flags) };
    let Ok(count) = usize::try_from(count) else {
        return Err(Error::last_error());
    };
    let mut all = Vec::with_capacity(count);
    for index in 0..count {
        // SAFETY: libvirt returned `count` records, each a valid pointer with a live domain and `nparams` parameters until
        // the list is freed; everything is copied out at once.
        unsafe {
            let record = *records.add(index);
            let name = virt_sys::virDomainGetName((*record).dom);
            if name.is_null() {
                continue;
            }
            let length = usize::try_from((*record).nparams).unwrap_or(0);
            let fields = (0..length).filter_map(|i| field((*record).params.add(i))).collect();
            all.push((CStr::from_ptr(name).to_string_lossy().into_owned(), fields));
        }
    }
    // SAFETY: `records` came from the call above, is freed once, and nothing borrowed from it is left.
    unsafe { virt_sys::virDomainStatsRecordListFree(records) };
    Ok(all)
}

/// Copies a parameter, if it is of a type we know and not negative.
///
/// # Safety
/// `parameter` points to a parameter libvirt has filled in.
unsafe fn field(parameter: *const virt_sys::virTypedParameter) -> Option<(String, Statistic)> {
    // SAFETY: the caller's promise; libvirt terminates the name, and `type_` says which part of the union it has set.
    unsafe {
        let name = CStr::from_ptr((*parameter).field.as_ptr()).to_string_lossy().into_owned();
        let value = &(*parameter).value;
        let value = match c_uint::try_from((*parameter).type_).ok()? {
            virt_sys::VIR_TYPED_PARAM_INT => Statistic::Number(value.i.try_into().ok()?),
            virt_sys::VIR_TYPED_PARAM_UINT => Statistic::Number(value.ui.into()),
            virt_sys::VIR_TYPED_PARAM_LLONG => Statistic::Number(value.l.try_into().ok()?),
            virt_sys::VIR_TYPED_PARAM_ULLONG => Statistic::Number(value.ul),
            virt_sys::VIR_TYPED_PARAM_STRING if !value.s.is_null() => {
                Statistic::Text(CStr::from_ptr(value.s).to_string_lossy().into_owned())
            }
            _ => return None,
        };
        Some((name, value))
    }
}
