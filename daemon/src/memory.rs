//! Memory that builds have let go of. The process's allocator is mimalloc; what is written in C++, the store's engine,
//! has the C library's.

use libmimalloc_sys::{mi_collect, mi_option_set, mi_option_t};

/// In milliseconds. The binding has no name for it.
const PURGE_DELAY: mi_option_t = 15;

/// Has pages that become free given back at once. By default each thread may leave them for a second, and then until
/// one of them happens to look: with a build's many short-lived threads that adds up to more than what is in use.
pub(crate) fn configure() {
    // SAFETY: sets a number that is read with each use; may be called at any time.
    unsafe { mi_option_set(PURGE_DELAY, 0) }
}

/// Gives freed memory back to the system: the allocators keep what a build needed for the next one, and a daemon may
/// be idle for long. Blocking, for some milliseconds.
pub(crate) fn give_back() {
    // SAFETY: looks after the calling thread's memory and what threads that ended have left.
    unsafe { mi_collect(true) }
    #[cfg(target_env = "gnu")]
    // SAFETY: takes the allocator's own locks; may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}
