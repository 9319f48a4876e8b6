//! Sizes and durations as `buildkitd.toml` writes them: numbers, or texts such as `512MB`, `10%`, `48h`.

use std::time::Duration;

/// An amount of disk space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskSpace {
    /// Bytes.
    Bytes(i64),
    /// Percent of the file system that holds the root.
    Percent(i64),
}

impl DiskSpace {
    /// In bytes, on a file system of `capacity` bytes.
    pub fn bytes(self, capacity: u64) -> i64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => {
                let share = u128::from(capacity) * u128::try_from(percent).unwrap_or(0) / 100;
                i64::try_from(share).unwrap_or(i64::MAX)
            }
        }
    }

    /// `10%`, `512MB`, `1GiB`, `1000`. As in that file of buildkitd, `MB` is short for `MiB`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        if let Some(percent) = text.strip_suffix('%') {
            let percent: i64 = percent.trim().parse().ok()?;
            return (0..=100).contains(&percent).then_some(Self::Percent(percent));
        }
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let number: f64 = number.parse().ok()?;
        let power = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 1,
            "m" | "mb" | "mib" => 2,
            "g" | "gb" | "gib" => 3,
            "t" | "tb" | "tib" => 4,
            "p" | "pb" | "pib" => 5,
            _ => return None,
        };
        let factor = 1024f64.powi(power);
        let bytes = number * factor;
        (bytes.is_finite() && bytes >= 0.0 && bytes < i64::MAX as f64).then_some(Self::Bytes(bytes as i64))
    }
}

/// Go's duration text: `1h30m`, `48h`, `250ms`, `1.5h`; a bare number is refused (callers know its unit).
pub(crate) fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    if rest.is_empty() {
        return None;
    }
    let mut seconds = 0f64;
    while !rest.is_empty() {
        let split = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(split);
        let number: f64 = number.parse().ok()?;
        let end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        seconds += number
            * match unit {
                "ns" => 1e-9,
                "us" | "µs" | "μs" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return None,
            };
        rest = tail;
    }
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(DiskSpace::parse("512MB"), Some(DiskSpace::Bytes(512 << 20)));
        assert_eq!(DiskSpace::parse("1.5 GiB"), Some(DiskSpace::Bytes(1_610_612_736)));
        assert_eq!(DiskSpace::parse("10%"), Some(DiskSpace::Percent(10)));
        assert_eq!(DiskSpace::Percent(10).bytes(2000), 200);
        for bad in ["", "MB", "-1", "101%", "1XB", "1e400"] {
            assert_eq!(DiskSpace::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("1h30m"), Some(Duration::from_secs(5400)));
        assert_eq!(parse_duration("250ms"), Some(Duration::from_millis(250)));
        for bad in ["", "5", "h", "5x", "-3s"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
    }
}
