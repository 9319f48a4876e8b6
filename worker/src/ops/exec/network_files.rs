//! `/etc/hosts` and `/etc/resolv.conf` of a step.

use kiln_proto::pb;

use crate::Dns;

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

/// The content of `/etc/resolv.conf`: the host's, with what the daemon's configuration sets. Blocking.
pub(crate) fn resolv_conf(dns: &Dns) -> String {
    let host = match std::fs::read_to_string("/etc/resolv.conf") {
        Ok(text) if text.lines().any(|line| line.trim_start().starts_with("nameserver")) => text,
        _ => FALLBACK.to_owned(),
    };
    with_dns(host, dns)
}

/// Puts the configured lines in the place of the host's.
fn with_dns(host: String, dns: &Dns) -> String {
    let joined = |words: &[String]| Vec::from_iter((!words.is_empty()).then(|| words.join(" ")));
    let (search, options) = (joined(&dns.search), joined(&dns.options));
    let replaced: Vec<(&[&str], &[String])> =
        vec![(&["nameserver"], &dns.nameservers), (&["search", "domain"], &search), (&["options"], &options)];
    let replaced: Vec<_> = replaced.into_iter().filter(|(_, values)| !values.is_empty()).collect();
    if replaced.is_empty() {
        return host;
    }
    let kept = host.lines().filter(|line| {
        let name = line.split_whitespace().next().unwrap_or_default();
        !replaced.iter().any(|(names, _)| names.contains(&name))
    });
    let own = replaced.iter().flat_map(|(names, values)| values.iter().map(|v| format!("{} {v}", names[0])));
    kept.map(str::to_owned).chain(own).map(|line| line + "\n").collect()
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

    #[test]
    fn configured_name_resolution_replaces_the_hosts_line_by_line() {
        let host = "# made by hand\nnameserver 10.0.0.1\nnameserver 10.0.0.2\ndomain old\noptions ndots:1\n";
        let dns = |nameservers: &[&str], search: &[&str]| Dns {
            nameservers: nameservers.iter().map(|&server| server.to_owned()).collect(),
            search: search.iter().map(|&domain| domain.to_owned()).collect(),
            options: Vec::new(),
        };
        assert_eq!(with_dns(host.to_owned(), &Dns::default()), host);
        assert_eq!(
            with_dns(host.to_owned(), &dns(&["1.1.1.1", "::1"], &["a", "b"])),
            "# made by hand\noptions ndots:1\nnameserver 1.1.1.1\nnameserver ::1\nsearch a b\n"
        );
    }
}
