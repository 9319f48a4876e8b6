//! How much output of one step is shown: a total, a speed, and the last bytes of what was cut when
//! the step fails. Sizes are those of BuildKit, with its environment variables.

use std::collections::{HashMap, VecDeque};
use std::time::SystemTime;

use kiln_solver::progress::VertexLog;

const MAX_SIZE: i64 = 2 << 20;
const MAX_SPEED: i64 = 200 << 10;
const TAIL: usize = 256 << 10;

/// What becomes of a piece of output.
pub(super) enum Clip {
    /// All of it is shown.
    Keep,
    /// This is shown in its place.
    Cut(Vec<u8>),
    /// Nothing is shown.
    Drop,
}

/// The limits and what has been used of them.
pub(super) struct LogLimits {
    max_size: i64,
    max_speed: i64,
    streams: HashMap<(String, i64), Stream>,
}

struct Stream {
    started: SystemTime,
    shown: i64,
    clipped: bool,
    tail: VecDeque<u8>,
}

impl Default for LogLimits {
    fn default() -> Self {
        let limit = |name: &str, default| {
            std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
        };
        Self::new(
            limit("BUILDKIT_STEP_LOG_MAX_SIZE", MAX_SIZE),
            limit("BUILDKIT_STEP_LOG_MAX_SPEED", MAX_SPEED),
        )
    }
}

impl LogLimits {
    /// Bytes in all and bytes a second for each stream of each vertex; negative is no limit.
    pub(super) fn new(max_size: i64, max_speed: i64) -> Self {
        Self { max_size, max_speed, streams: HashMap::new() }
    }

    pub(super) fn admit(&mut self, vertex: &str, stream: i64, data: &[u8], now: SystemTime) -> Clip {
        let state = self.streams.entry((vertex.to_owned(), stream)).or_insert_with(|| Stream {
            started: now,
            shown: 0,
            clipped: false,
            tail: VecDeque::new(),
        });
        let length = i64::try_from(data.len()).unwrap_or(i64::MAX);
        let room = if self.max_size < 0 { i64::MAX } else { (self.max_size - state.shown).max(0) };
        let seconds = now.duration_since(state.started).unwrap_or_default().as_secs_f64().max(1.0);
        let fast = self.max_speed >= 0 && (state.shown + length) as f64 / seconds > self.max_speed as f64;
        if !fast && room >= length && !state.clipped {
            state.shown += length;
            return Clip::Keep;
        }
        let resumes = state.clipped && !fast && room >= length;
        if resumes {
            state.clipped = false;
            state.tail.clear();
            state.shown += length;
            return Clip::Keep;
        }
        let first = !state.clipped;
        state.clipped = true;
        let shown = if fast || !first { 0 } else { usize::try_from(room).unwrap_or(0).min(data.len()) };
        state.shown += i64::try_from(shown).unwrap_or(0);
        state.tail.extend(&data[shown..]);
        let excess = state.tail.len().saturating_sub(TAIL);
        state.tail.drain(..excess);
        if !first {
            return Clip::Drop;
        }
        let limit = if fast { format!("{}/s", size(self.max_speed)) } else { size(self.max_size) };
        let mut cut = data[..shown].to_vec();
        cut.extend_from_slice(format!("\n[output clipped, log limit {limit} reached]\n").as_bytes());
        Clip::Cut(cut)
    }

    /// The last output of a vertex that was not shown; the vertex failed.
    pub(super) fn tail(&mut self, vertex: &str) -> Vec<VertexLog> {
        let mut logs = Vec::new();
        for ((digest, stream), state) in &mut self.streams {
            if digest == vertex && state.clipped && !state.tail.is_empty() {
                logs.push(VertexLog {
                    vertex: vertex.to_owned(),
                    stream: *stream,
                    data: std::mem::take(&mut state.tail).into(),
                    timestamp: SystemTime::now(),
                });
            }
        }
        logs
    }

    pub(super) fn clear(&mut self) {
        self.streams.clear();
    }
}

/// `2MiB`, `200KiB`.
fn size(bytes: i64) -> String {
    match bytes {
        b if b >= 1 << 20 && b % (1 << 20) == 0 => format!("{}MiB", b >> 20),
        b if b >= 1 << 10 && b % (1 << 10) == 0 => format!("{}KiB", b >> 10),
        b => format!("{b}B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(clip: Clip, data: &[u8]) -> Option<String> {
        match clip {
            Clip::Keep => Some(String::from_utf8_lossy(data).into_owned()),
            Clip::Cut(cut) => Some(String::from_utf8_lossy(&cut).into_owned()),
            Clip::Drop => None,
        }
    }

    #[test]
    fn total_size() {
        let now = SystemTime::now();
        let mut limits = LogLimits::new(8, -1);
        assert_eq!(text(limits.admit("v", 1, b"12345", now), b"12345").as_deref(), Some("12345"));
        let cut = text(limits.admit("v", 1, b"67890", now), b"67890");
        assert_eq!(cut.as_deref(), Some("678\n[output clipped, log limit 8B reached]\n"));
        assert_eq!(text(limits.admit("v", 1, b"more", now), b"more"), None);
        assert_eq!(text(limits.admit("v", 2, b"other", now), b"other").as_deref(), Some("other"));
        let tail = limits.tail("v");
        assert_eq!(tail.len(), 1);
        assert_eq!(tail[0].data, b"90more");
        assert!(limits.tail("v").is_empty());
    }

    #[test]
    fn speed_recovers() {
        let now = SystemTime::now();
        let mut limits = LogLimits::new(-1, 10);
        assert!(matches!(limits.admit("v", 1, &[b'a'; 10], now), Clip::Keep));
        assert!(matches!(limits.admit("v", 1, b"b", now), Clip::Cut(_)));
        let later = now + std::time::Duration::from_secs(3);
        assert!(matches!(limits.admit("v", 1, b"c", later), Clip::Keep));
    }
}
