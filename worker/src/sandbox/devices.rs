//! Devices of a confined sandbox: which nodes `/dev` has, and which device numbers may be opened.
//!
//! Making nodes is allowed as in Docker (packages do it); opening anything but the harmless ones is not. The rule
//! list is turned into the form each cgroup version wants.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// One allowed access to devices of a kind; `None` is any number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DeviceRule {
    /// `c` or `b`.
    pub(super) kind: char,
    pub(super) major: Option<u32>,
    pub(super) minor: Option<u32>,
    pub(super) access: u8,
}

const MKNOD: u8 = 1;
const READ: u8 = 2;
const WRITE: u8 = 4;
const ALL: u8 = MKNOD | READ | WRITE;

const fn rule(kind: char, major: Option<u32>, minor: Option<u32>, access: u8) -> DeviceRule {
    DeviceRule { kind, major, minor, access }
}

/// What a confined sandbox may do; everything else is refused.
pub(super) const CONFINED: &[DeviceRule] = &[
    rule('c', None, None, MKNOD),
    rule('b', None, None, MKNOD),
    rule('c', Some(1), Some(3), ALL), // null
    rule('c', Some(1), Some(5), ALL), // zero
    rule('c', Some(1), Some(7), ALL), // full
    rule('c', Some(1), Some(8), ALL), // random
    rule('c', Some(1), Some(9), ALL), // urandom
    rule('c', Some(5), Some(0), ALL), // tty
    rule('c', Some(5), Some(2), ALL), // ptmx
    rule('c', Some(136), None, ALL),  // pts
];

/// Nodes every `/dev` gets: name, major, minor.
pub(super) const DEFAULT_NODES: &[(&str, u32, u32)] =
    &[("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// Links every `/dev` gets: name, target.
pub(super) const DEFAULT_LINKS: &[(&str, &str)] = &[
    ("ptmx", "pts/ptmx"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("core", "/proc/kcore"),
];

/// Lines for `devices.allow` of cgroup v1.
pub(super) fn v1_lines(rules: &[DeviceRule]) -> Vec<String> {
    let number = |n: Option<u32>| n.map_or_else(|| "*".to_owned(), |n| n.to_string());
    rules
        .iter()
        .map(|r| {
            let access: String = [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')]
                .iter()
                .filter(|(bit, _)| r.access & bit != 0)
                .map(|(_, c)| *c)
                .collect();
            format!("{} {}:{} {access}", r.kind, number(r.major), number(r.minor))
        })
        .collect()
}

/// One eBPF instruction in the kernel's layout.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Insn {
    code: u8,
    regs: u8,
    off: i16,
    imm: i32,
}

const LOAD_U32: u8 = 0x61;
const MOV_REG: u8 = 0xbf;
const MOV_IMM: u8 = 0xb7;
const AND_IMM: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x77;
const JUMP_NOT_EQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

/// The rules as a cgroup device program: context in r1 (access and type, major, minor), verdict in r0.
fn program(rules: &[DeviceRule]) -> Vec<Insn> {
    let op = |code, dst: u8, src: u8, off, imm| Insn { code, regs: dst | (src << 4), off, imm };
    let mut out = vec![
        op(LOAD_U32, 2, 1, 0, 0),
        op(LOAD_U32, 4, 1, 4, 0),
        op(LOAD_U32, 5, 1, 8, 0),
        op(MOV_REG, 3, 2, 0, 0),
        op(SHIFT_RIGHT, 3, 0, 0, 16),
        op(AND_IMM, 2, 0, 0, 0xffff),
    ];
    for rule in rules {
        let mut body = Vec::new();
        // Offsets to the next rule are filled in below.
        body.push(op(JUMP_NOT_EQUAL, 2, 0, 0, if rule.kind == 'b' { 1 } else { 2 }));
        if rule.access != ALL {
            body.push(op(MOV_REG, 1, 3, 0, 0));
            body.push(op(AND_IMM, 1, 0, 0, i32::from(ALL & !rule.access)));
            body.push(op(JUMP_NOT_EQUAL, 1, 0, 0, 0));
        }
        for (register, number) in [(4, rule.major), (5, rule.minor)] {
            if let Some(number) = number {
                body.push(op(JUMP_NOT_EQUAL, register, 0, 0, number as i32));
            }
        }
        body.push(op(MOV_IMM, 0, 0, 0, 1));
        body.push(op(EXIT, 0, 0, 0, 0));
        let len = body.len();
        for (at, insn) in body.iter_mut().enumerate() {
            if insn.code == JUMP_NOT_EQUAL {
                insn.off = (len - at - 1) as i16;
            }
        }
        out.extend(body);
    }
    out.push(op(MOV_IMM, 0, 0, 0, 0));
    out.push(op(EXIT, 0, 0, 0, 0));
    out
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

#[repr(C)]
#[derive(Default)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct AttachAttr {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

fn bpf<T>(command: libc::c_int, attr: &T) -> io::Result<i32> {
    // SAFETY: `attr` is a plain C struct of the given size that outlives the call; the kernel only reads it.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

/// Attaches the rules to a cgroup v2 directory; they hold for everything beneath it, as long as it exists.
pub(super) fn attach_v2(cgroup: BorrowedFd<'_>, rules: &[DeviceRule]) -> io::Result<()> {
    let insns = program(rules);
    let license = c"Apache-2.0";
    let load = LoadAttr {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: insns.len() as u32,
        insns: insns.as_ptr() as u64,
        license: license.as_ptr() as u64,
        ..LoadAttr::default()
    };
    let fd = bpf(BPF_PROG_LOAD, &load)?;
    // SAFETY: the kernel just returned this descriptor to us.
    let program = unsafe { OwnedFd::from_raw_fd(fd) };
    let attach = AttachAttr {
        target_fd: cgroup.as_raw_fd() as u32,
        attach_bpf_fd: program.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI,
    };
    bpf(BPF_PROG_ATTACH, &attach).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Interprets the few instructions a device program uses.
    fn allows(rules: &[DeviceRule], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let program = program(rules);
        let context = [kind | (access << 16), major, minor];
        let mut r = [0u64; 11];
        let mut pc = 0usize;
        loop {
            let i = program[pc];
            pc += 1;
            let (dst, src) = (usize::from(i.regs & 15), usize::from(i.regs >> 4));
            match i.code {
                LOAD_U32 => r[dst] = u64::from(context[i.off as usize / 4]),
                MOV_REG => r[dst] = r[src],
                MOV_IMM => r[dst] = i.imm as u64,
                AND_IMM => r[dst] &= i.imm as u64,
                SHIFT_RIGHT => r[dst] >>= i.imm,
                JUMP_NOT_EQUAL if r[dst] != i.imm as u64 => pc += i.off as usize,
                JUMP_NOT_EQUAL => {}
                EXIT => return r[0] != 0,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn confined_rules_allow_making_all_nodes_and_opening_few() {
        let (block, char) = (1, 2);
        assert!(allows(CONFINED, block, MKNOD.into(), 8, 0));
        assert!(!allows(CONFINED, block, READ.into(), 8, 0));
        assert!(!allows(CONFINED, block, u32::from(READ | MKNOD), 8, 0));
        assert!(allows(CONFINED, char, u32::from(READ | WRITE), 1, 3));
        assert!(!allows(CONFINED, block, READ.into(), 1, 3));
        assert!(!allows(CONFINED, char, READ.into(), 1, 1));
        assert!(allows(CONFINED, char, u32::from(READ | WRITE), 136, 77));
        assert!(!allows(&[], char, READ.into(), 1, 3));
    }

    #[test]
    fn the_kernel_takes_the_program_and_keeps_to_it() {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let v2 = mounts.lines().find(|l| l.contains(" - cgroup2 ")).and_then(|l| l.split(' ').nth(4));
        let (Some(v2), true) = (v2, rustix::process::geteuid().is_root()) else {
            println!("skipped: needs root and a version 2 cgroup tree");
            return;
        };
        let dir = std::path::Path::new(v2).join(format!("kiln-test-devices-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        let fd = rustix::fs::open(&dir, rustix::fs::OFlags::RDONLY, rustix::fs::Mode::empty()).unwrap();
        attach_v2(std::os::fd::AsFd::as_fd(&fd), CONFINED).unwrap();
        let script =
            "echo $$ > $0/cgroup.procs; : < /dev/null && : < /dev/zero && ! (: < /dev/kmsg) 2>/dev/null";
        let status = std::process::Command::new("sh").args(["-c", script]).arg(&dir).status().unwrap();
        std::fs::remove_dir(&dir).unwrap();
        assert!(status.success());
    }

    #[test]
    fn v1_form() {
        let lines = v1_lines(CONFINED);
        assert_eq!(lines[0], "c *:* m");
        assert!(lines.contains(&"c 1:3 rwm".to_owned()) && lines.contains(&"c 136:* rwm".to_owned()));
    }
}
