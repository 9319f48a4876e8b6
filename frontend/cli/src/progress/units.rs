//! Sizes and times as people read them.

/// Decimal units, as `buildx` prints them: `123B`, `2.38kB`, `29.13MB`.
pub(crate) fn bytes(count: i64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    if count < 1000 {
        return format!("{count}B");
    }
    let mut value = count as f64 / 1000.0;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{value:.2}{}", UNITS[unit])
}

/// Reads a size such as `512`, `10mb`, `1.5GB` (decimal) or `2GiB` (binary).
pub(crate) fn parse_bytes(text: &str) -> Result<i64, String> {
    let invalid = || format!("invalid size {text:?}: expected e.g. 500mb or 2GiB");
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().map_err(|_| invalid())?;
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return Err(invalid()),
    };
    let size = number * factor;
    // Above 2^53 a float no longer counts bytes, and no disk is that large.
    if size.is_finite() && size < 9e15 { Ok(size as i64) } else { Err(invalid()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(bytes(0), "0B");
        assert_eq!(bytes(999), "999B");
        assert_eq!(bytes(2380), "2.38kB");
        assert_eq!(bytes(29_126_278), "29.13MB");
        assert_eq!(parse_bytes("10mb").unwrap(), 10_000_000);
        assert_eq!(parse_bytes("1.5GiB").unwrap(), 1_610_612_736);
        assert_eq!(parse_bytes("7").unwrap(), 7);
        for text in ["", "mb", "1xb", "1e30", "99999999tb"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }
}
