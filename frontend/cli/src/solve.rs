//! `kiln solve`: builds an LLB definition from standard input, as `buildctl build` does.

use std::collections::HashMap;
use std::io::Read;

use kiln_proto::control::SolveRequest;
use kiln_proto::{llb, pb};
use kiln_session::client::Attachables;
use prost::Message;

use crate::args::{Connection, SolveArgs};
use crate::auth::DockerConfig;
use crate::caches::Caches;
use crate::error::CliError;
use crate::progress::Display;
use crate::run::{self, Job};
use crate::{attach, build, inputs, layout, outputs};

/// Builds what standard input defines.
pub(crate) fn main(connection: &Connection, args: &SolveArgs) -> Result<(), CliError> {
    let mut input = Vec::new();
    std::io::stdin()
        .read_to_end(&mut input)
        .map_err(|error| CliError::file("read", "standard input", error))?;
    if input.is_empty() {
        return Err(CliError::usage("no LLB definition on standard input"));
    }
    let mut definition = pb::Definition::decode(input.as_slice())
        .map_err(|error| CliError::usage(format!("standard input is no LLB definition: {error}")))?;
    if args.no_cache {
        ignore_cache(&mut definition);
    }
    let caches = Caches::parse(&args.caches)?;
    let outputs = outputs::complete(outputs::parse(&args.outputs)?, false, &[], &[])?;
    let display = Display::new(args.progress, false)?;
    let response = run::solve(connection, display, || {
        let mut attachables = Attachables::new();
        attachables.share(inputs::locals(&args.locals)?);
        attachables.auth(DockerConfig);
        attachables.secrets(attach::secrets(&args.secrets)?);
        if !args.ssh.is_empty() {
            attachables.ssh(attach::agents(&args.ssh)?);
        }
        outputs::attach(&outputs, &caches, std::iter::empty(), &mut attachables);
        let request = SolveRequest {
            r#ref: kiln_session::new_id(),
            definition: Some(definition.clone()),
            exporters: outputs::exporters(&outputs),
            entitlements: args.allow.clone(),
            frontend_attrs: HashMap::new(),
            cache: Some(caches.options()),
            ..Default::default()
        };
        Ok(Job { request, attachables, shared_key: String::new() })
    })?;
    layout::record(&outputs, &response)?;
    caches.record(&response)?;
    args.metadata_file.as_ref().map_or(Ok(()), |path| build::metadata_file(path, &response))
}

/// Every vertex runs anew: the wish stands in the metadata, so digests stay as they are.
fn ignore_cache(definition: &mut pb::Definition) {
    for bytes in &definition.def {
        definition.metadata.entry(llb::digest(bytes)).or_default().ignore_cache = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignoring_the_cache_marks_every_vertex() {
        let mut definition = pb::Definition { def: vec![vec![1], vec![2]], ..Default::default() };
        ignore_cache(&mut definition);
        assert_eq!(definition.metadata.len(), 2);
        assert!(definition.metadata.values().all(|metadata| metadata.ignore_cache));
        assert_eq!(definition.def, [vec![1], vec![2]]);
    }
}
