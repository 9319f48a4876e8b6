//! Memory that builds have let go of.

/// Gives freed memory back to the system: the allocator keeps what a build needed for the next one, and a daemon may
/// be idle for long. Blocking, for some milliseconds.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes the allocator's own locks; may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}
