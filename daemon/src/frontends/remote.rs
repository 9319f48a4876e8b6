//! Build contexts that are a URL: a git repository, an archive, which is unpacked, or a lone Dockerfile. Clients give
//! what comes on their standard input a URL, too.

use std::collections::HashMap;

use kiln_proto::{llb, pattern, pb};
use tonic::Code;

use super::contexts::{Contexts, named};
use crate::engine::files;
use crate::error::BuildError;

/// What the file is called that holds what the URL gave.
const NAME: &str = "context";
/// How much of it says what it is.
const HEAD: u64 = 1024;

/// A context that was fetched.
pub(super) struct Remote {
    pub(super) definition: pb::Definition,
    /// The same with what stands outside the directory that is built, such as the Dockerfile.
    pub(super) whole: pb::Definition,
    /// The Dockerfile, if there is nothing else.
    pub(super) dockerfile: Option<&'static str>,
}

/// Fetches the context at `url`; `subdir` of it is what is built, unless it is a lone Dockerfile.
///
/// # Errors
/// The URL is none of git or http, or there is nothing.
pub(super) async fn fetch(contexts: Contexts<'_>, url: &str, subdir: &str) -> Result<Remote, BuildError> {
    let mut builder = llb::Builder::new();
    if let Some((source, metadata)) = git(url, &contexts.request.opts)? {
        let repository = builder.add(&source, metadata);
        return Ok(part(builder, repository, subdir));
    }
    let Some(source) = http(url) else {
        return Err(BuildError::unsupported(format_args!("remote build context {url}")));
    };
    let digest = builder.add(&source, named("[internal] load remote build context"));
    let fetched = builder.finish(&pb::Input { digest: digest.clone(), index: 0 });
    let failed = |error: BuildError| error.context("failed to read downloaded context");
    let reference = contexts.solve(fetched.clone()).await?;
    let head = match reference {
        Some(reference) => {
            reference.read(|root| files::read_file(root, NAME, 0, HEAD)).await.map_err(failed)?
        }
        None => Vec::new(),
    };
    if !is_archive(&head) {
        return Ok(Remote { definition: fetched.clone(), whole: fetched, dockerfile: Some(NAME) });
    }
    let unpack = pb::FileActionCopy {
        src: format!("/{NAME}"),
        attempt_unpack_docker_compatibility: true,
        ..pb::FileActionCopy::default()
    };
    let unpacked = builder.add(&copy(digest, unpack), named("[internal] unpack remote build context"));
    Ok(part(builder, unpacked, subdir))
}

/// The context that is a directory of what the vertex `whole` gives.
fn part(mut builder: llb::Builder, whole: String, subdir: &str) -> Remote {
    let finish = |builder: &llb::Builder, digest| builder.finish(&pb::Input { digest, index: 0 });
    let all = finish(&builder, whole.clone());
    if subdir.is_empty() {
        return Remote { definition: all.clone(), whole: all, dockerfile: None };
    }
    let part = pb::FileActionCopy {
        src: pattern::clean(&format!("/{subdir}")),
        dir_copy_contents: true,
        ..pb::FileActionCopy::default()
    };
    let title = named(&format!("[internal] take {subdir} of the build context"));
    let digest = builder.add(&copy(whole, part), title);
    Remote { definition: finish(&builder, digest), whole: all, dockerfile: None }
}

/// What a named context has at a URL: the files of a git repository, or a file. `None` if the text is no URL of either.
pub(super) fn source(key: &str, url: &str) -> Result<Option<pb::Definition>, BuildError> {
    let http = || Some((http(url)?, named(&format!("[context {key}] {url}"))));
    let Some((source, metadata)) = git(url, &HashMap::new())?.or_else(http) else { return Ok(None) };
    let mut builder = llb::Builder::new();
    let digest = builder.add(&source, metadata);
    Ok(Some(builder.finish(&pb::Input { digest, index: 0 })))
}

/// The source of a git repository and its vertex's metadata, if the URL is one.
fn git(url: &str, attrs: &HashMap<String, String>) -> Result<Option<(pb::Op, pb::OpMetadata)>, BuildError> {
    kiln_dockerfile::git_context(url, attrs).map_err(|error| BuildError::new(Code::InvalidArgument, error))
}

/// The source of a file, if the URL is fetched by http.
fn http(url: &str) -> Option<pb::Op> {
    if !url.starts_with("http://") && !url.starts_with("https://") {
        return None;
    }
    let source = pb::op::Op::Source(pb::SourceOp {
        identifier: url.to_owned(),
        attrs: [("http.filename".to_owned(), NAME.to_owned())].into(),
    });
    Some(pb::Op { op: Some(source), ..pb::Op::default() })
}

/// Copies to the root of an empty file system.
fn copy(from: String, action: pb::FileActionCopy) -> pb::Op {
    let action = pb::FileActionCopy { dest: "/".into(), mode: -1, timestamp: -1, ..action };
    let action = pb::FileAction {
        input: llb::EMPTY,
        secondary_input: 0,
        output: 0,
        action: Some(pb::file_action::Action::Copy(action.into())),
    };
    pb::Op {
        inputs: vec![pb::Input { digest: from, index: 0 }],
        op: Some(pb::op::Op::File(pb::FileOp { actions: vec![action] })),
        ..pb::Op::default()
    }
}

/// Whether a file that begins like this is a tar archive or may be a compressed one.
fn is_archive(head: &[u8]) -> bool {
    const COMPRESSED: [&[u8]; 3] = [b"BZh", b"\x1f\x8b\x08", b"\xfd7zXZ\0"];
    COMPRESSED.iter().any(|magic| head.starts_with(magic)) || is_tar(head)
}

/// Whether the first block is a tar header: its checksum is right.
fn is_tar(head: &[u8]) -> bool {
    const CHECKSUM: std::ops::Range<usize> = 148..156;
    let Some(block) = head.first_chunk::<512>() else { return false };
    let digits = String::from_utf8_lossy(&block[CHECKSUM]);
    let Ok(expected) = u32::from_str_radix(digits.trim_matches(['\0', ' ']), 8) else { return false };
    let sum = block.iter().enumerate().map(|(at, byte)| {
        // The field itself counts as blanks.
        u32::from(if CHECKSUM.contains(&at) { b' ' } else { *byte })
    });
    sum.sum::<u32>() == expected
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archives() {
        let mut header = [0; 1024];
        header[..4].copy_from_slice(b"file");
        header[148..156].copy_from_slice(b"000645\0 ");
        let sum: u32 = b"file".iter().map(|byte| u32::from(*byte)).sum::<u32>() + 8 * 32;
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        assert!(is_archive(&header));
        header[0] = b'g';
        assert!(!is_archive(&header));
        assert!(is_archive(b"\x1f\x8b\x08rest"));
        for not in [&b""[..], b"FROM scratch\n", &[0; 1024]] {
            assert!(!is_archive(not));
        }
    }
}
