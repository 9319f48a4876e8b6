//! Attestations that a build is to have: `--attest`, and its short forms `--provenance` and `--sbom`.

use std::collections::BTreeMap;

use kiln_dockerfile::parse_bool;

use crate::args::AttestArgs;
use crate::csv;
use crate::error::CliError;

/// The frontend's options that ask for them.
pub(crate) fn attrs(args: &AttestArgs) -> Result<BTreeMap<String, String>, CliError> {
    let mut attrs = BTreeMap::new();
    let short = [("provenance", &args.provenance), ("sbom", &args.sbom)];
    let short = short.into_iter().filter_map(|(kind, value)| Some(long(kind, value.as_deref()?)));
    for spec in args.attest.iter().cloned().chain(short) {
        let wrong = |text: &str| CliError::usage(format!("invalid attestation {spec:?}: {text}"));
        let (mut kind, mut on, mut rest) = (None, true, Vec::new());
        for field in csv::fields(&spec)? {
            match field.split_once('=') {
                Some(("type", value)) => kind = Some(value.to_owned()),
                Some(("disabled", value)) => {
                    on = !parse_bool(value).ok_or_else(|| wrong("disabled is a boolean"))?
                }
                Some(_) => rest.push(quoted(&field)),
                None => return Err(wrong(&format!("{field:?} is not key=value"))),
            }
        }
        let kind = kind.ok_or_else(|| wrong("type is missing"))?;
        let value = if on { rest.join(",") } else { "disabled=true".to_owned() };
        if attrs.insert(format!("attest:{kind}"), value).is_some() {
            return Err(wrong("this type was given before"));
        }
    }
    Ok(attrs)
}

/// What a short form stands for.
fn long(kind: &str, value: &str) -> String {
    match parse_bool(value) {
        Some(true) => format!("type={kind}"),
        Some(false) => format!("type={kind},disabled=true"),
        None => format!("type={kind},{value}"),
    }
}

fn quoted(field: &str) -> String {
    match field.contains([',', '"']) {
        true => format!("\"{}\"", field.replace('"', "\"\"")),
        false => field.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(attest: &[&str], provenance: Option<&str>, sbom: Option<&str>) -> Result<String, CliError> {
        let own = |value: Option<&str>| value.map(str::to_owned);
        let attest = attest.iter().map(|spec| (*spec).to_owned()).collect();
        let args = AttestArgs { attest, provenance: own(provenance), sbom: own(sbom) };
        Ok(attrs(&args)?.iter().map(|(key, value)| format!("{key} {value};")).collect())
    }

    #[test]
    fn short_forms_are_what_they_stand_for() {
        assert_eq!(asked(&[], None, None).unwrap(), "");
        assert_eq!(asked(&[], Some("true"), None).unwrap(), "attest:provenance ;");
        assert_eq!(asked(&[], Some("mode=max"), None).unwrap(), "attest:provenance mode=max;");
        let spec = "type=provenance,mode=max,\"builder-id=a,b\"";
        assert_eq!(asked(&[spec], None, None).unwrap(), "attest:provenance mode=max,\"builder-id=a,b\";");
        assert_eq!(
            asked(&["type=sbom"], Some("false"), None).unwrap(),
            "attest:provenance disabled=true;attest:sbom ;"
        );
        asked(&["mode=max"], None, None).expect_err("no type");
        asked(&["type=provenance"], Some("true"), None).expect_err("twice");
        asked(&["type=provenance,max"], None, None).expect_err("no value");
    }
}
