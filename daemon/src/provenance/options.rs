//! What a client says about the attestations that it wants.

use std::collections::HashMap;

use tonic::Code;

use crate::error::BuildError;

const PREFIX: &str = "attest:";
const PROVENANCE: &str = "provenance";

/// How much a predicate says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// No values of build arguments and labels, no steps.
    Min,
    /// All.
    Max,
}

/// Version of SLSA's predicate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    V02,
    V1,
}

impl Version {
    /// JSON pointer to what BuildKit adds to the predicate's metadata.
    pub(crate) fn metadata(self) -> &'static str {
        match self {
            Self::V02 => "/metadata/https:~1~1mobyproject.org~1buildkit@v1#metadata",
            Self::V1 => "/runDetails/metadata/buildkit_metadata",
        }
    }

    /// The predicate's type.
    pub(crate) fn predicate_type(self) -> &'static str {
        match self {
            Self::V02 => "https://slsa.dev/provenance/v0.2",
            Self::V1 => "https://slsa.dev/provenance/v1",
        }
    }
}

/// Options of `attest:provenance`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) mode: Mode,
    pub(crate) version: Version,
    pub(crate) inline_only: bool,
    pub(crate) builder_id: String,
    pub(crate) reproducible: bool,
    /// Results with sources that nobody can name fail.
    pub(crate) complete_materials: bool,
    pub(crate) filename: String,
}

fn wrong(text: String) -> BuildError {
    BuildError::new(Code::InvalidArgument, text)
}

/// Refuses attestations that can't be made. `granted` are the attributes of the build itself, without which
/// nobody would make what a frontend is asked for.
pub(crate) fn check(
    attrs: &HashMap<String, String>,
    granted: &HashMap<String, String>,
) -> Result<(), BuildError> {
    for (key, value) in attrs {
        let Some(kind) = key.strip_prefix(PREFIX) else { continue };
        let disabled = value.split(',').any(|part| part == "disabled=true");
        if !disabled && (kind != PROVENANCE || !granted.contains_key(key)) {
            return Err(BuildError::unsupported(format_args!("attestation {kind}")));
        }
    }
    Ok(())
}

impl Options {
    /// For the record of a build, which is asked for nothing: all that is known.
    pub(crate) fn recorded(builder: &str) -> Self {
        Self {
            mode: Mode::Max,
            version: Version::V1,
            inline_only: false,
            builder_id: builder.to_owned(),
            reproducible: false,
            complete_materials: false,
            filename: "provenance.json".into(),
        }
    }

    /// What a build's attributes ask for; `None`: no provenance.
    pub(crate) fn of(attrs: &HashMap<String, String>) -> Result<Option<Self>, BuildError> {
        let Some(text) = attrs.get(&format!("{PREFIX}{PROVENANCE}")) else { return Ok(None) };
        let mut options = Self::recorded("");
        let mut disabled = false;
        let parts = kiln_dockerfile::csv_fields(text)
            .map_err(|error| wrong(format!("failed to parse provenance {text:?}: {error}")))?;
        for part in parts.iter().filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').unwrap_or((part.as_str(), "true"));
            let boolean = || {
                kiln_dockerfile::parse_bool(value)
                    .ok_or_else(|| wrong(format!("failed to parse {key} flag {value:?} of provenance")))
            };
            match key {
                "mode" => {
                    options.mode = match value {
                        "min" => Mode::Min,
                        "max" | "full" => Mode::Max,
                        _ => return Err(wrong(format!("invalid mode {value:?} of provenance"))),
                    }
                }
                "version" => {
                    options.version = match value {
                        "" | "v1" => Version::V1,
                        "v0.2" => Version::V02,
                        _ => return Err(wrong(format!("invalid provenance SLSA version: {value}"))),
                    }
                }
                // Some clients say again what this is.
                "type" if value == PROVENANCE => {}
                "disabled" => disabled = boolean()?,
                "inline-only" => options.inline_only = boolean()?,
                "reproducible" => options.reproducible = boolean()?,
                "complete-materials" => options.complete_materials = boolean()?,
                "capture-usage" => {
                    if boolean()? {
                        return Err(BuildError::unsupported("provenance with capture-usage"));
                    }
                }
                "builder-id" => value.clone_into(&mut options.builder_id),
                "filename" if value.is_empty() || value.contains('/') => {
                    return Err(wrong(format!("invalid filename {value:?} of provenance")));
                }
                "filename" => value.clone_into(&mut options.filename),
                _ => return Err(BuildError::unsupported(format_args!("option {key} of provenance"))),
            }
        }
        Ok((!disabled).then_some(options))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attrs(key: &str, value: &str) -> HashMap<String, String> {
        [(key.to_owned(), value.to_owned())].into()
    }

    #[test]
    fn what_is_asked_for() {
        let of = |text: &str| Options::of(&attrs("attest:provenance", text)).expect("valid");
        let default = of("").expect("wanted");
        assert_eq!((default.mode, default.version), (Mode::Max, Version::V1));
        assert_eq!(default.filename, "provenance.json");
        let min = of("mode=min,inline-only=true,version=v0.2,builder-id=me").expect("wanted");
        assert_eq!((min.mode, min.version, min.inline_only), (Mode::Min, Version::V02, true));
        assert_eq!(min.builder_id, "me");
        assert_eq!(of("type=provenance,mode=max").expect("wanted"), default);
        assert_eq!(of("\"builder-id=a,b\"").expect("wanted").builder_id, "a,b");
        assert_eq!(of("disabled=true"), None);
        assert_eq!(Options::of(&HashMap::new()).expect("valid"), None);
        Options::of(&attrs("attest:provenance", "mode=huge")).expect_err("no such mode");
        Options::of(&attrs("attest:provenance", "made-up=1")).expect_err("no such option");
    }

    #[test]
    fn what_cannot_be_made() {
        let text = |asked: &HashMap<String, String>, granted: &HashMap<String, String>| {
            check(asked, granted).expect_err("refused").message
        };
        let sbom = attrs("attest:sbom", "");
        assert_eq!(text(&sbom, &sbom), "unsupported: attestation sbom");
        let provenance = attrs("attest:provenance", "mode=min");
        assert_eq!(text(&provenance, &HashMap::new()), "unsupported: attestation provenance");
        check(&provenance, &provenance).expect("asked for in the build's own attributes");
        check(&attrs("attest:sbom", "disabled=true"), &HashMap::new()).expect("not asked for");
    }
}
