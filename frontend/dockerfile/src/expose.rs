//! Port specifications of EXPOSE: `[[ip:]host:]container[-end][/proto]`.

use std::net::IpAddr;

use crate::error::{Fault, Result};
use crate::gofmt;
use crate::lint::{self, Rule};

/// `port/proto` for each port that the specifications name, in their order.
pub(crate) fn ports(specs: &[String], warn: &mut dyn FnMut(Rule, String)) -> Result<Vec<String>> {
    let mut out = Vec::new();
    for spec in specs {
        let (ip, host, container) = split(spec);
        let (container, proto) = container.split_once('/').unwrap_or((container, "tcp"));
        let proto = if proto.is_empty() { "tcp" } else { proto };
        let lower = proto.to_lowercase();
        if container.is_empty() {
            return Err(Fault::new(format!("invalid port: {}: no port specified", gofmt::quote(spec))));
        }
        if !matches!(lower.as_str(), "tcp" | "udp" | "sctp") {
            return Err(Fault::new(format!("invalid port: {}: invalid proto: {proto}", gofmt::quote(spec))));
        }
        if proto != lower {
            warn(
                lint::EXPOSE_PROTO_CASING,
                format!("Defined protocol '{spec}' in EXPOSE instruction should be lowercase"),
            );
        }
        if !ip.is_empty() || !host.is_empty() {
            let message = format!(
                "EXPOSE instruction should not define an IP address or host-port mapping, found '{spec}'"
            );
            warn(lint::EXPOSE_FORMAT, message);
        }
        let bare = ip.strip_prefix('[').and_then(|i| i.strip_suffix(']')).unwrap_or(ip);
        if !bare.is_empty() && bare.parse::<IpAddr>().is_err() {
            return Err(Fault::new(format!("invalid IP address: {ip}")));
        }
        let (start, end) =
            range(container).ok_or_else(|| Fault::new(format!("invalid containerPort: {container}")))?;
        if !host.is_empty() {
            let (from, to) = range(host).ok_or_else(|| Fault::new(format!("invalid hostPort: {host}")))?;
            if end - start != to - from && end != start {
                let message =
                    format!("invalid ranges specified for container and host Ports: {container} and {host}");
                return Err(Fault::new(message));
            }
        }
        out.extend((start..=end).map(|port| format!("{port}/{lower}")));
    }
    Ok(out)
}

fn split(spec: &str) -> (&str, &str, &str) {
    let Some((rest, container)) = spec.rsplit_once(':') else { return ("", "", spec) };
    match rest.rsplit_once(':') {
        Some((ip, host)) => (ip, host, container),
        None => ("", rest, container),
    }
}

fn range(text: &str) -> Option<(u16, u16)> {
    let (start, end) = text.split_once('-').unwrap_or((text, text));
    let (start, end) = (start.parse().ok()?, end.parse().ok()?);
    (start <= end).then_some((start, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expose(spec: &str) -> (Result<Vec<String>, String>, usize) {
        let mut warnings = 0;
        let ports = ports(&[spec.to_string()], &mut |_, _| warnings += 1).map_err(|f| f.message);
        (ports, warnings)
    }

    #[test]
    fn specifications() {
        for (spec, want, warnings) in [
            ("80", &["80/tcp"][..], 0),
            ("53/UDP", &["53/udp"], 1),
            ("8000-8002", &["8000/tcp", "8001/tcp", "8002/tcp"], 0),
            ("127.0.0.1:1:80", &["80/tcp"], 1),
            ("[::1]:1:80/tcp", &["80/tcp"], 1),
        ] {
            assert_eq!(expose(spec), (Ok(want.iter().map(|s| s.to_string()).collect()), warnings), "{spec}");
        }
        for (spec, want) in [
            ("x", "invalid containerPort: x"),
            ("90-80", "invalid containerPort: 90-80"),
            ("80/foo", "invalid port: \"80/foo\": invalid proto: foo"),
            ("/tcp", "invalid port: \"/tcp\": no port specified"),
            ("a.b:1:80", "invalid IP address: a.b"),
            ("x:80", "invalid hostPort: x"),
            ("70000", "invalid containerPort: 70000"),
        ] {
            assert_eq!(expose(spec).0, Err(want.to_string()));
        }
    }
}
