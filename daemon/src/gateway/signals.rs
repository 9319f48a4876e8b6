//! Signals by the names that clients use, without `SIG`.

/// The numbers of the signals that have one and the same on every Linux.
const NAMES: &[(&str, i32)] = &[
    ("ABRT", libc::SIGABRT),
    ("ALRM", libc::SIGALRM),
    ("BUS", libc::SIGBUS),
    ("CHLD", libc::SIGCHLD),
    ("CLD", libc::SIGCHLD),
    ("CONT", libc::SIGCONT),
    ("FPE", libc::SIGFPE),
    ("HUP", libc::SIGHUP),
    ("ILL", libc::SIGILL),
    ("INT", libc::SIGINT),
    ("IO", libc::SIGIO),
    ("IOT", libc::SIGIOT),
    ("KILL", libc::SIGKILL),
    ("PIPE", libc::SIGPIPE),
    ("POLL", libc::SIGPOLL),
    ("PROF", libc::SIGPROF),
    ("PWR", libc::SIGPWR),
    ("QUIT", libc::SIGQUIT),
    ("SEGV", libc::SIGSEGV),
    ("STKFLT", libc::SIGSTKFLT),
    ("STOP", libc::SIGSTOP),
    ("SYS", libc::SIGSYS),
    ("TERM", libc::SIGTERM),
    ("TRAP", libc::SIGTRAP),
    ("TSTP", libc::SIGTSTP),
    ("TTIN", libc::SIGTTIN),
    ("TTOU", libc::SIGTTOU),
    ("URG", libc::SIGURG),
    ("USR1", libc::SIGUSR1),
    ("USR2", libc::SIGUSR2),
    ("VTALRM", libc::SIGVTALRM),
    ("WINCH", libc::SIGWINCH),
    ("XCPU", libc::SIGXCPU),
    ("XFSZ", libc::SIGXFSZ),
];

/// The first and the last of the signals without a meaning of their own.
const REALTIME: (i32, i32) = (34, 64);

/// The number of a signal: `TERM`, `RTMIN`, `RTMIN+3`, `RTMAX-2`.
pub(super) fn number(name: &str) -> Option<i32> {
    let (first, last) = REALTIME;
    let realtime = |offset: &str, sign: char, from: i32, direction: i32| match offset {
        "" => Some(from),
        offset => Some(from + direction * offset.strip_prefix(sign)?.parse::<u8>().ok().map(i32::from)?),
    };
    let found = if let Some(offset) = name.strip_prefix("RTMIN") {
        realtime(offset, '+', first, 1)
    } else if let Some(offset) = name.strip_prefix("RTMAX") {
        realtime(offset, '-', last, -1)
    } else {
        return NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
    };
    found.filter(|number| (first..=last).contains(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (name, wanted) in [
            ("KILL", Some(9)),
            ("HUP", Some(1)),
            ("RTMIN", Some(34)),
            ("RTMIN+15", Some(49)),
            ("RTMAX-14", Some(50)),
            ("RTMAX", Some(64)),
            ("RTMAX-31", None),
            ("RTMIN-1", None),
            ("SIGKILL", None),
            ("9", None),
            ("", None),
        ] {
            assert_eq!(number(name), wanted, "{name}");
        }
    }
}
