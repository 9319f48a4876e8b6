//! Platforms as images and clients write them (`linux/arm64/v8`): parsing, one normal form, and which
//! images a platform can run. Works on [`pb::Platform`]; asks nothing of the machine beyond the
//! architecture this program was compiled for.

use crate::pb;

/// A platform string that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?}: {reason}: invalid argument")]
pub struct ParseError {
    text: String,
    reason: &'static str,
}

const KNOWN_OS: &[&str] = &[
    "aix",
    "android",
    "darwin",
    "dragonfly",
    "freebsd",
    "hurd",
    "illumos",
    "ios",
    "js",
    "linux",
    "nacl",
    "netbsd",
    "openbsd",
    "plan9",
    "solaris",
    "windows",
    "zos",
];

const KNOWN_ARCH: &[&str] = &[
    "386",
    "amd64",
    "amd64p32",
    "arm",
    "armbe",
    "arm64",
    "arm64be",
    "ppc64",
    "ppc64le",
    "loong64",
    "mips",
    "mipsle",
    "mips64",
    "mips64le",
    "mips64p32",
    "mips64p32le",
    "ppc",
    "riscv",
    "riscv64",
    "s390",
    "s390x",
    "sparc",
    "sparc64",
    "wasm",
];

/// The platform this program runs on, in normal form.
pub fn host() -> pb::Platform {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        "loongarch64" => "loong64",
        other => other,
    };
    let mut platform =
        pb::Platform { architecture: architecture.into(), os: "linux".into(), ..Default::default() };
    normalize(&mut platform);
    platform
}

/// Reads `os`, `arch`, `os/arch` or `os/arch/variant` (an OS version may follow the OS in
/// parentheses) and gives it in normal form. What is left out comes from [`host`].
pub fn parse(text: &str) -> Result<pb::Platform, ParseError> {
    let err = |reason| ParseError { text: text.to_string(), reason };
    if text.contains('*') {
        return Err(err("wildcards not yet supported"));
    }
    let parts: Vec<&str> = text.split('/').collect();
    let plain = |s: &str| !s.is_empty() && s.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c));
    let (os, os_version) = match parts[0].split_once('(') {
        Some((os, rest)) => match rest.strip_suffix(')') {
            Some(version) => (os, version),
            None => return Err(err("invalid OS component")),
        },
        None => (parts[0], ""),
    };
    if !plain(os) || !parts[1..].iter().all(|p| plain(p)) {
        return Err(err("invalid component: must consist of letters, digits, '_', '-' and '.'"));
    }
    let mut platform = pb::Platform { os_version: os_version.to_string(), ..Default::default() };
    match parts[1..] {
        [] => {
            let lower = os.to_ascii_lowercase();
            let os_name = if lower == "macos" { "darwin" } else { lower.as_str() };
            if KNOWN_OS.contains(&os_name) {
                let here = host();
                platform.os = os_name.to_string();
                platform.architecture = here.architecture;
                platform.variant = here.variant;
            } else {
                platform.os = host().os;
                platform.architecture = lower;
                normalize(&mut platform);
                if !KNOWN_ARCH.contains(&platform.architecture.as_str()) {
                    return Err(err("unknown operating system or architecture"));
                }
            }
        }
        [arch] => {
            platform.os = os.to_string();
            platform.architecture = arch.to_string();
        }
        [arch, variant] => {
            platform.os = os.to_string();
            platform.architecture = arch.to_string();
            platform.variant = variant.to_string();
        }
        _ => return Err(err("cannot parse platform specifier")),
    }
    normalize(&mut platform);
    Ok(platform)
}

/// `os/arch[/variant]`.
pub fn format(platform: &pb::Platform) -> String {
    if platform.os.is_empty() {
        return "unknown".to_string();
    }
    let mut out = platform.os.clone();
    for part in [&platform.architecture, &platform.variant] {
        if !part.is_empty() {
            out.push('/');
            out.push_str(part);
        }
    }
    out
}

/// `os[(version)]/arch[/variant]`: [`format()`] with the OS version, where there is one.
pub fn format_all(platform: &pb::Platform) -> String {
    if platform.os_version.is_empty() {
        return format(platform);
    }
    let versioned =
        pb::Platform { os: format!("{}({})", platform.os, platform.os_version), ..platform.clone() };
    format(&versioned)
}

/// Brings aliases (`x86_64`, `aarch64`, `armhf`, `arm64/v8`, …) into the one form that is compared.
/// An empty OS becomes `linux`.
pub fn normalize(platform: &mut pb::Platform) {
    platform.os = match platform.os.to_ascii_lowercase().as_str() {
        "" => "linux".into(),
        "macos" => "darwin".into(),
        os => os.into(),
    };
    let arch = platform.architecture.to_ascii_lowercase();
    let variant = platform.variant.to_ascii_lowercase();
    let (arch, variant) = match (arch.as_str(), variant.as_str()) {
        ("i386", _) => ("386", ""),
        ("x86_64" | "x86-64" | "amd64", "v1") => ("amd64", ""),
        ("x86_64" | "x86-64" | "amd64", v) => ("amd64", v),
        ("aarch64" | "arm64", "8" | "v8" | "v8.0") => ("arm64", ""),
        ("aarch64" | "arm64", "9" | "9.0" | "v9.0") => ("arm64", "v9"),
        ("aarch64" | "arm64", v) => ("arm64", v),
        ("armhf", _) => ("arm", "v7"),
        ("armel", _) => ("arm", "v6"),
        ("arm", "" | "7") => ("arm", "v7"),
        ("arm", "5") => ("arm", "v5"),
        ("arm", "6") => ("arm", "v6"),
        ("arm", "8") => ("arm", "v8"),
        (a, v) => (a, v),
    };
    (platform.architecture, platform.variant) = (arch.to_string(), variant.to_string());
}

/// [`normalize`] on a copy.
pub fn normalized(platform: &pb::Platform) -> pb::Platform {
    let mut copy = platform.clone();
    normalize(&mut copy);
    copy
}

/// True if both name the same OS, architecture and variant.
pub fn same(a: &pb::Platform, b: &pb::Platform) -> bool {
    let (a, b) = (normalized(a), normalized(b));
    a.os == b.os && a.architecture == b.architecture && a.variant == b.variant
}

/// How well an image for `have` serves `want`: 0 is exact, larger is a worse but runnable match
/// (an older variant, 32 bit on 64 bit), `None` does not run.
pub fn rank(want: &pb::Platform, have: &pb::Platform) -> Option<usize> {
    let have = normalized(have);
    runnable(want).iter().position(|p| same(p, &have) && version_fits(want, &have))
}

/// The index of the entry that serves `want` best; the first of equals. `None` entries (an index entry
/// without platform) never match.
pub fn select<'a>(
    want: &pb::Platform,
    have: impl IntoIterator<Item = Option<&'a pb::Platform>>,
) -> Option<usize> {
    let ranked = have.into_iter().enumerate().filter_map(|(i, p)| rank(want, p?).map(|r| (r, i)));
    ranked.min().map(|(_, i)| i)
}

fn version_fits(want: &pb::Platform, have: &pb::Platform) -> bool {
    if want.os != "windows" || want.os_version.is_empty() || have.os_version.is_empty() {
        return true;
    }
    // A Windows image runs on the same build number, whatever its revision.
    let build = |v: &str| v.splitn(4, '.').take(3).map(str::to_string).collect::<Vec<_>>();
    build(&want.os_version) == build(&have.os_version)
}

/// `want` and what else it runs, best first.
fn runnable(want: &pb::Platform) -> Vec<pb::Platform> {
    let want = normalized(want);
    let with =
        |arch: &str, variant: String| pb::Platform { architecture: arch.into(), variant, ..want.clone() };
    let number = |v: &str| v.trim_start_matches('v').parse::<u32>().ok();
    let down = |arch: &str, from: u32, to: u32| -> Vec<pb::Platform> {
        (to..=from).rev().map(|n| with(arch, format!("v{n}"))).collect()
    };
    let mut out = Vec::new();
    match want.architecture.as_str() {
        "amd64" => {
            out.push(want.clone());
            if let Some(n) = number(&want.variant).filter(|n| (2..=9).contains(n)) {
                out.extend(down("amd64", n - 1, 1));
            }
            out.push(with("386", String::new()));
        }
        "arm" => match number(&want.variant).filter(|n| (5..=9).contains(n)) {
            Some(n) => out.extend(down("arm", n, 5)),
            None => out.push(want.clone()),
        },
        "arm64" => {
            let (major, minor) = match want.variant.trim_start_matches('v').split_once('.') {
                Some((major, minor)) => (major.parse().unwrap_or(0), minor.parse().unwrap_or(0)),
                None => (number(&want.variant).unwrap_or(8), 0u32),
            };
            out.push(want.clone());
            let mut series: Vec<(u32, u32)> = Vec::new();
            // v9.x contains v8.(x+5).
            if major == 9 {
                series.push((9, minor.min(9)));
                series.push((8, (minor + 5).min(9)));
            } else if major == 8 {
                series.push((8, minor.min(9)));
            }
            for (major, minor) in series {
                for m in (0..=minor).rev() {
                    out.push(with(
                        "arm64",
                        if m == 0 { format!("v{major}") } else { format!("v{major}.{m}") },
                    ));
                }
            }
            if matches!(major, 8 | 9) {
                out.extend(down("arm", 8, 5));
            }
        }
        _ => out.push(want.clone()),
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn p(text: &str) -> pb::Platform {
        parse(text).unwrap_or_else(|e| panic!("{e}"))
    }

    #[test]
    fn aliases_have_one_form() {
        for (given, want) in [
            ("linux/x86_64", "linux/amd64"),
            ("linux/amd64/v1", "linux/amd64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("Linux/aarch64", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/armhf", "linux/arm/v7"),
            ("linux/arm/6", "linux/arm/v6"),
            ("macos/arm64", "darwin/arm64"),
            ("s390x", "linux/s390x"),
        ] {
            assert_eq!(format(&p(given)), want, "{given}");
        }
        assert_eq!(format_all(&p("windows(10.0.17763)/amd64")), "windows(10.0.17763)/amd64");
    }

    #[test]
    fn malformed_is_refused() {
        for text in ["", "linux/", "a/b/c/d", "linux/*", "nosuch", "li nux/amd64", "windows(1/amd64"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn selection_prefers_the_nearest_runnable() {
        let have = [p("linux/386"), p("linux/amd64"), p("linux/arm/v6"), p("linux/arm/v7"), p("linux/arm64")];
        let pick = |want: &str| select(&p(want), have.iter().map(Some));
        assert_eq!(pick("linux/amd64"), Some(1));
        assert_eq!(pick("linux/amd64/v3"), Some(1));
        assert_eq!(pick("linux/arm64/v9"), Some(4));
        assert_eq!(pick("linux/arm/v5"), None);
        assert_eq!(pick("linux/arm/v8"), Some(3));
        assert_eq!(pick("windows/amd64"), None);
        assert_eq!(select(&p("linux/amd64"), [None, Some(&p("linux/386"))]), Some(1));
    }
}
