//! `/etc/hosts` and `/etc/resolv.conf` of a step.

use kiln_proto::pb;

/// What resolvers are asked where the host names none.
const FALLBACK: &str = "nameserver 8.8.8.8\nnameserver 8.8.4.4\n";

/// The content of `/etc/hosts`: the step's own names, then those that the build adds.
pub(crate) fn hosts(hostname: &str, extra: &[pb::HostIp]) -> String {
    let mut text = format!("127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for host in extra {
        text.push_str(&format!("{}\t{}\n", host.ip, host.host));
    }
    text
}

/// The content of `/etc/resolv.conf`: the host's. Blocking.
pub(crate) fn resolv_conf() -> String {
    match std::fs::read_to_string("/etc/resolv.conf") {
        Ok(text) if text.lines().any(|line| line.trim_start().starts_with("nameserver")) => text,
        _ => FALLBACK.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_names_the_step_and_the_extra_hosts() {
        let extra = [pb::HostIp { host: "db".into(), ip: "10.0.0.7".into() }];
        assert_eq!(
            hosts("buildkitsandbox", &extra),
            "127.0.0.1\tlocalhost buildkitsandbox\n::1\tlocalhost ip6-localhost ip6-loopback\n10.0.0.7\tdb\n"
        );
    }
}
