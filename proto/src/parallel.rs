//! Work on many items, on all processors. Knows nothing of what the items are.

use rayon::prelude::*;

/// From this many items on, work is worth spreading: below, that takes longer than it saves.
pub const MANY: usize = 2048;

/// Maps each item, on all processors if there are `many`; of several errors it gives the first in the
/// items' order. Blocks for as long as that takes.
pub fn each<I, U: Send, E: Send>(
    many: bool,
    items: I,
    map: impl Fn(<I as IntoIterator>::Item) -> Result<U, E> + Send + Sync,
) -> Result<Vec<U>, E>
where
    I: IntoIterator + IntoParallelIterator<Item = <I as IntoIterator>::Item, Iter: IndexedParallelIterator>,
{
    if !many {
        return items.into_iter().map(map).collect();
    }
    let mapped: Vec<Result<U, E>> = items.into_par_iter().with_min_len(MANY / 4).map(map).collect();
    mapped.into_iter().collect()
}
