//! The process's allocator, mimalloc: threads free what others allocated, and here that costs neither locks nor memory
//! left behind. What is written in C++, the store's engine, has the C library's.

use std::alloc::{GlobalAlloc, Layout};

use libmimalloc_sys as mi;

/// In milliseconds. The binding has no name for it.
const PURGE_DELAY: mi::mi_option_t = 15;

/// mimalloc. It is asked for an alignment only where it does not give that by itself: asking costs a search, and a
/// larger block for most sizes.
pub struct Allocator;

/// Whether blocks of that size are aligned so without being asked to.
fn is_natural(size: usize, align: usize) -> bool {
    align <= align_of::<usize>() || (align <= 16 && size >= 16)
}

// SAFETY: every block comes from mimalloc and goes back to it, whichever of its functions made it; blocks of 16 bytes
// and more are aligned to 16, smaller ones to their size rounded up to words.
unsafe impl GlobalAlloc for Allocator {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let (size, align) = (layout.size(), layout.align());
        // SAFETY: takes any size and any power of two.
        unsafe {
            if is_natural(size, align) { mi::mi_malloc(size) } else { mi::mi_malloc_aligned(size, align) }
                .cast()
        }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let (size, align) = (layout.size(), layout.align());
        // SAFETY: takes any size and any power of two.
        unsafe {
            if is_natural(size, align) { mi::mi_zalloc(size) } else { mi::mi_zalloc_aligned(size, align) }
                .cast()
        }
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, _: Layout) {
        // SAFETY: the caller gives back a block from here.
        unsafe { mi::mi_free(block.cast()) }
    }

    #[inline]
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let align = layout.align();
        // SAFETY: the caller gives a block from here.
        unsafe {
            if is_natural(size, align) {
                mi::mi_realloc(block.cast(), size)
            } else {
                mi::mi_realloc_aligned(block.cast(), size, align)
            }
            .cast()
        }
    }
}

/// Prefers little memory to the last bit of speed. Pages that become free are given back at once: by default each
/// thread may leave them for a second, and then until one of them happens to look. And threads share two arenas of the C
/// library instead of having up to eight for each processor, each with holes of its own.
pub fn be_frugal() {
    // SAFETY: sets a number that is read with each use; may be called at any time.
    unsafe { mi::mi_option_set(PURGE_DELAY, 0) }
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number that is read when a thread takes its first block.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

/// Gives freed memory back to the system: the allocators keep what a build needed for the next one, and a daemon may
/// be idle for long. Blocking, for some milliseconds.
pub fn give_back() {
    // SAFETY: looks after the calling thread's memory and what threads that ended have left.
    unsafe { mi::mi_collect(true) }
    #[cfg(target_env = "gnu")]
    // SAFETY: takes the allocator's own locks; may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// How many bytes of memory this process has; 0 where that can't be told.
pub fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0);
    // SAFETY: asks for a constant of the system.
    pages * u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[global_allocator]
    static ALLOCATOR: Allocator = Allocator;

    #[test]
    fn what_is_in_use_is_resident() {
        let before = resident();
        let block = vec![1_u8; 64 << 20];
        assert!(before > 0 && resident() >= before + (60 << 20));
        drop(block);
    }

    #[test]
    fn blocks_are_aligned_and_keep_what_they_hold() {
        for align in [1, 2, 4, 8, 16, 32, 64, 4096] {
            for size in (1..300).chain([1000, 4096, 70_000, 3 << 20]) {
                let layout = Layout::from_size_align(size, align).expect("small");
                // SAFETY: only what was allocated is written and given back.
                unsafe {
                    let block = ALLOCATOR.alloc_zeroed(layout);
                    assert!(!block.is_null() && block.addr().is_multiple_of(align), "{size} at {align}");
                    assert_eq!(*block.add(size - 1), 0);
                    block.write_bytes(7, size);
                    let grown = ALLOCATOR.realloc(block, layout, size * 2);
                    assert!(
                        !grown.is_null() && grown.addr().is_multiple_of(align),
                        "{size} at {align}, grown"
                    );
                    assert_eq!((*grown, *grown.add(size - 1)), (7, 7));
                    ALLOCATOR.dealloc(grown, Layout::from_size_align(size * 2, align).expect("small"));
                }
            }
        }
    }
}
