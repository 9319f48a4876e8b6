//! Brings a `SolveRequest` into its current form and refuses what is malformed, not allowed, or not
//! there, before anything is started.

use kiln_proto::control::{Exporter, SolveRequest};
use tonic::Code;

use crate::config::Config;
use crate::error::BuildError;
use crate::provenance;

/// Compatibility versions that clients may ask for; 0 is the current one.
const COMPATIBILITY: &[i64] = &[0, 10, 20, 30];

/// The request, with deprecated fields translated.
pub(super) fn current(mut request: SolveRequest) -> Result<SolveRequest, BuildError> {
    if request.r#ref.is_empty() {
        return Err(BuildError::new(Code::InvalidArgument, "solve request without a ref"));
    }
    if let Some((_, id)) = request.session.split_once(':') {
        request.session = id.to_owned();
    }
    if request.exporters.is_empty() && !request.exporter_deprecated.is_empty() {
        request.exporters.push(Exporter {
            r#type: std::mem::take(&mut request.exporter_deprecated),
            attrs: std::mem::take(&mut request.exporter_attrs_deprecated),
        });
    }
    if let Some(epoch) = request.frontend_attrs.get("build-arg:SOURCE_DATE_EPOCH").cloned() {
        for exporter in &mut request.exporters {
            exporter.attrs.entry("source-date-epoch".into()).or_insert_with(|| epoch.clone());
        }
    }
    Ok(request)
}

/// Refuses what cannot be done.
pub(super) fn check(request: &SolveRequest, config: &Config) -> Result<(), BuildError> {
    for entitlement in &request.entitlements {
        if !config.entitlements.contains(entitlement) {
            return Err(BuildError::build(format!(
                "granting entitlement {entitlement} is not allowed by build daemon configuration"
            )));
        }
    }
    if !COMPATIBILITY.contains(&request.compatibility_version) {
        let text = format!("unknown compatibility version {}", request.compatibility_version);
        return Err(BuildError::new(Code::InvalidArgument, text));
    }
    if request.proxy_network {
        return Err(BuildError::unsupported("proxy network"));
    }
    provenance::check(&request.frontend_attrs, &request.frontend_attrs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> SolveRequest {
        SolveRequest { r#ref: "r".into(), ..SolveRequest::default() }
    }

    #[test]
    fn old_forms_are_translated() {
        let request = SolveRequest {
            session: "prefix:id".into(),
            exporter_deprecated: "oci".into(),
            exporter_attrs_deprecated: [("name".to_owned(), "x".to_owned())].into(),
            frontend_attrs: [("build-arg:SOURCE_DATE_EPOCH".to_owned(), "7".to_owned())].into(),
            ..request()
        };
        let request = current(request).expect("valid");
        assert_eq!(request.session, "id");
        assert_eq!(request.exporters[0].r#type, "oci");
        assert_eq!(request.exporters[0].attrs["name"], "x");
        assert_eq!(request.exporters[0].attrs["source-date-epoch"], "7");
    }

    #[test]
    fn refusals() {
        let text = |request: SolveRequest| check(&request, &Config::default()).expect_err("refused").message;
        assert_eq!(
            text(SolveRequest { entitlements: vec!["network.host".into()], ..request() }),
            "granting entitlement network.host is not allowed by build daemon configuration"
        );
        assert!(text(SolveRequest { compatibility_version: 15, ..request() }).contains("15"));
        assert!(current(SolveRequest::default()).expect_err("refused").message.contains("ref"));
        let attest = [("attest:sbom".to_owned(), String::new())].into();
        assert_eq!(
            text(SolveRequest { frontend_attrs: attest, ..request() }),
            "unsupported: attestation sbom"
        );
        let disabled = [("attest:provenance".to_owned(), "disabled=true".to_owned())].into();
        check(&SolveRequest { frontend_attrs: disabled, ..request() }, &Config::default()).expect("disabled");
    }
}
