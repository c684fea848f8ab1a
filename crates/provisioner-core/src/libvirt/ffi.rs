//! The few libvirt calls the safe wrapper lacks or gets wrong, and the only unsafe code of the suite.
//!
//! The wrapper's `all_domain_stats` gives no fields and leaks its list; its `Domain::state` drops the error of
//! a failed call and then reports a state that is none.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_int};
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
