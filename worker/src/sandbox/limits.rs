//! cgroup limits in the terms of both versions: which file of which controller gets which value.

use std::fs;
use std::io;
use std::path::Path;

use super::plan::Limits;

/// One limit, in the terms of each version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Setting {
    Memory(i64),
    /// Memory and swap together, and the memory limit.
    Swap(i64, Option<i64>),
    Shares(u64),
    /// Quota and period in microseconds.
    Quota(Option<i64>, Option<u64>),
    Cpus(String),
    Mems(String),
    Pids(i64),
}

/// The settings that limits ask for.
pub(super) fn wanted(limits: &Limits) -> Vec<Setting> {
    let mut list = Vec::new();
    list.extend(limits.memory.map(Setting::Memory));
    list.extend(limits.memory_swap.map(|s| Setting::Swap(s, limits.memory)));
    list.extend(limits.cpu_shares.map(Setting::Shares));
    if limits.cpu_quota.is_some() || limits.cpu_period.is_some() {
        list.push(Setting::Quota(limits.cpu_quota, limits.cpu_period));
    }
    list.extend(limits.cpus.clone().map(Setting::Cpus));
    list.extend(limits.mems.clone().map(Setting::Mems));
    list.extend(limits.pids.map(Setting::Pids));
    list
}

const DEFAULT_PERIOD: u64 = 100_000;

impl Setting {
    /// The controller that keeps it.
    pub(super) fn controller(&self) -> &'static str {
        match self {
            Self::Memory(_) | Self::Swap(..) => "memory",
            Self::Shares(_) | Self::Quota(..) => "cpu",
            Self::Cpus(_) | Self::Mems(_) => "cpuset",
            Self::Pids(_) => "pids",
        }
    }

    /// File and value on version 2.
    fn v2(&self) -> (&'static str, String) {
        let max = |n: i64| if n < 0 { "max".to_owned() } else { n.to_string() };
        match self {
            Self::Memory(n) => ("memory.max", max(*n)),
            // Version 2 counts swap alone.
            Self::Swap(n, memory) => {
                ("memory.swap.max", if *n < 0 { max(-1) } else { max((*n - memory.unwrap_or(0)).max(0)) })
            }
            // Both scales, 2 to 262144 and 1 to 10000, mapped end to end.
            Self::Shares(n) => ("cpu.weight", (1 + (n.clamp(&2, &262_144) - 2) * 9999 / 262_142).to_string()),
            Self::Quota(quota, period) => {
                ("cpu.max", format!("{} {}", max(quota.unwrap_or(-1)), period.unwrap_or(DEFAULT_PERIOD)))
            }
            Self::Cpus(list) => ("cpuset.cpus", list.clone()),
            Self::Mems(list) => ("cpuset.mems", list.clone()),
            Self::Pids(n) => ("pids.max", max(*n)),
        }
    }

    /// Files and values on version 1, in the order they are written.
    fn v1(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Memory(n) => vec![("memory.limit_in_bytes", n.to_string())],
            Self::Swap(n, _) => vec![("memory.memsw.limit_in_bytes", n.to_string())],
            Self::Shares(n) => vec![("cpu.shares", n.to_string())],
            Self::Quota(quota, period) => {
                let mut list = Vec::new();
                list.extend(period.map(|p| ("cpu.cfs_period_us", p.to_string())));
                list.extend(quota.map(|q| ("cpu.cfs_quota_us", q.to_string())));
                list
            }
            Self::Cpus(list) => vec![("cpuset.cpus", list.clone())],
            Self::Mems(list) => vec![("cpuset.mems", list.clone())],
            Self::Pids(n) => vec![("pids.max", if *n < 0 { "max".to_owned() } else { n.to_string() })],
        }
    }

    /// Writes it to a version 2 group.
    pub(super) fn apply_v2(&self, dir: &Path) -> io::Result<()> {
        let (file, value) = self.v2();
        write(dir, file, &value)
    }

    /// Writes it to a version 1 group.
    pub(super) fn apply_v1(&self, dir: &Path) -> io::Result<()> {
        self.v1().into_iter().try_for_each(|(file, value)| write(dir, file, &value))
    }
}

fn write(dir: &Path, file: &str, value: &str) -> io::Result<()> {
    fs::write(dir.join(file), value)
        .map_err(|e| io::Error::new(e.kind(), format!("cannot set {file} to {value}: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_in_both_versions() {
        let limits = Limits {
            memory: Some(64 << 20),
            memory_swap: Some(96 << 20),
            cpu_shares: Some(1024),
            cpu_quota: Some(50_000),
            pids: Some(-1),
            ..Limits::default()
        };
        let v2: Vec<_> = wanted(&limits).iter().map(Setting::v2).collect();
        let text = |s: &str| s.to_owned();
        assert_eq!(
            v2,
            [
                ("memory.max", (64u64 << 20).to_string()),
                ("memory.swap.max", (32u64 << 20).to_string()),
                ("cpu.weight", text("39")),
                ("cpu.max", text("50000 100000")),
                ("pids.max", text("max")),
            ]
        );
        let v1: Vec<_> = wanted(&limits).iter().flat_map(Setting::v1).collect();
        assert_eq!(v1[1], ("memory.memsw.limit_in_bytes", (96u64 << 20).to_string()));
        assert_eq!(v1[3], ("cpu.cfs_quota_us", text("50000")));
        assert_eq!(Setting::Swap(-1, Some(5)).v2().1, "max");
    }
}
