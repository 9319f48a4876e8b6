//! `-o`, `--push` and `-t`: which exporters the daemon runs, and where on this machine their output goes.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};

use kiln_proto::control::Exporter;
use kiln_proto::reference::Reference;
use kiln_session::client::{Attachables, ContentDir, ExportTarget, Output};
use tokio::io::AsyncWrite;

use crate::caches::Caches;
use crate::csv;
use crate::error::CliError;

/// What daemons call the store that an image layout goes into.
const STORE: &str = "export";

/// One output: what the daemon does and where its bytes go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OutputSpec {
    pub(crate) kind: String,
    pub(crate) attrs: HashMap<String, String>,
    pub(crate) target: Target,
}

/// Where an exporter's output goes on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// Nowhere: the daemon keeps or pushes it.
    None,
    Stdout,
    File(PathBuf),
    /// Blob by blob into a directory in the form of an image layout.
    Layout(PathBuf),
    Dir {
        path: PathBuf,
        mirror: bool,
    },
}

/// What `type=docker` means without a dest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Docker {
    /// As docker's own commands: the image goes into a docker daemon, which is not done.
    Load,
    /// As buildctl: an archive on standard output.
    Archive,
}

/// Reads `-o` flags; `-` and a bare path are shorthands, as in docker.
pub(crate) fn parse(flags: &[String], docker: Docker) -> Result<Vec<OutputSpec>, CliError> {
    flags.iter().filter_map(|flag| one(flag, docker).transpose()).collect()
}

fn one(flag: &str, docker: Docker) -> Result<Option<OutputSpec>, CliError> {
    if flag == "-" {
        return Ok(Some(OutputSpec { kind: "tar".into(), attrs: HashMap::new(), target: Target::Stdout }));
    }
    if !flag.is_empty() && !flag.contains('=') && !flag.contains(',') {
        let target = Target::Dir { path: flag.into(), mirror: false };
        return Ok(Some(OutputSpec { kind: "local".into(), attrs: HashMap::new(), target }));
    }
    let mut attrs: HashMap<String, String> = HashMap::new();
    for field in csv::fields(flag)? {
        // A bare key switches something on.
        let (key, value) = field.split_once('=').unwrap_or((field.as_str(), "true"));
        attrs.insert(key.trim().to_owned(), value.to_owned());
    }
    let mut kind =
        attrs.remove("type").ok_or_else(|| CliError::usage(format!("invalid output {flag:?}: no type")))?;
    if kind == "cacheonly" {
        return Ok(None);
    }
    if kind == "registry" {
        kind = "image".into();
        attrs.insert("push".into(), "true".into());
    }
    let dest = attrs.remove("dest");
    let target = match kind.as_str() {
        "image" => match dest {
            Some(_) => {
                return Err(CliError::usage(format!("invalid output {flag:?}: type=image takes no dest")));
            }
            None => Target::None,
        },
        "local" => {
            let path = dest.ok_or_else(|| CliError::usage(format!("invalid output {flag:?}: no dest")))?;
            Target::Dir { path: path.into(), mirror: attrs.get("mode").is_some_and(|mode| mode == "delete") }
        }
        "tar" | "oci" | "docker" => {
            let archive = !attrs.get("tar").is_some_and(|tar| matches!(tar.as_str(), "false" | "0"));
            match dest.as_deref() {
                Some(path) if !archive && kind != "tar" => Target::Layout(path.into()),
                _ if !archive => {
                    return Err(CliError::usage(format!(
                        "invalid output {flag:?}: tar=false is for images with a dest"
                    )));
                }
                None if kind == "docker" && docker == Docker::Load => {
                    return Err(CliError::usage(
                        "unsupported: type=docker without dest (loading into a docker daemon)",
                    ));
                }
                None | Some("-") => Target::Stdout,
                Some(path) => Target::File(path.into()),
            }
        }
        // The daemon knows which exporters there are; it names the unknown one.
        _ => dest.map_or(Target::None, |path| Target::File(path.into())),
    };
    if target == Target::Stdout && io::stdout().is_terminal() {
        return Err(CliError::usage(format!(
            "output {flag:?}: refusing to write an archive to a terminal; give a dest"
        )));
    }
    if let Target::File(path) = &target {
        if path.is_dir() {
            return Err(CliError::usage(format!("output {flag:?}: {} is a directory", path.display())));
        }
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if !dir.is_dir() {
            return Err(CliError::usage(format!("output {flag:?}: no directory {}", dir.display())));
        }
    }
    if let Some(names) = attrs.get("name").filter(|_| matches!(kind.as_str(), "image" | "oci" | "docker")) {
        names.split(',').filter(|name| *name != "*").try_for_each(check_name)?;
    }
    Ok(Some(OutputSpec { kind, attrs, target }))
}

/// An image can only be named so that a registry understands it, which is better known before the build.
fn check_name(name: &str) -> Result<(), CliError> {
    let parsed = Reference::parse(name)
        .map_err(|error| CliError::usage(format!("invalid image name {name:?}: {error}")))?;
    match parsed.digest() {
        Some(_) => Err(CliError::usage(format!("invalid image name {name:?}: a digest can't be chosen"))),
        None => Ok(()),
    }
}

/// Applies `--push`, `-t` and `--annotation` to the outputs.
pub(crate) fn complete(
    mut outputs: Vec<OutputSpec>,
    push: bool,
    tags: &[String],
    annotations: &[String],
) -> Result<Vec<OutputSpec>, CliError> {
    tags.iter().try_for_each(|tag| check_name(tag))?;
    if push {
        match outputs.iter_mut().find(|output| output.kind == "image") {
            Some(output) => {
                output.attrs.insert("push".into(), "true".into());
            }
            None => outputs.push(OutputSpec {
                kind: "image".into(),
                attrs: HashMap::from([("push".into(), "true".into())]),
                target: Target::None,
            }),
        }
    }
    for output in &mut outputs {
        if !matches!(output.kind.as_str(), "image" | "oci" | "docker") {
            continue;
        }
        if !tags.is_empty() && !output.attrs.contains_key("name") {
            output.attrs.insert("name".into(), tags.join(","));
        }
        if output.attrs.get("push").is_some_and(|push| push == "true") && !output.attrs.contains_key("name") {
            return Err(CliError::usage("nothing to push: give the image a name with -t NAME"));
        }
        for annotation in annotations {
            let (key, value) = annotation.split_once('=').ok_or_else(|| {
                CliError::usage(format!("invalid annotation {annotation:?}: expected KEY=VALUE"))
            })?;
            let key = match key.split_once(':') {
                Some((kind, key)) => format!("annotation-{kind}.{key}"),
                None => format!("annotation.{key}"),
            };
            output.attrs.insert(key, value.to_owned());
        }
    }
    if outputs.iter().filter(|output| output.target == Target::Stdout).count() > 1 {
        return Err(CliError::usage("only one output can go to standard output"));
    }
    if layouts(&outputs).count() > 1 {
        return Err(CliError::usage("only one output can have tar=false"));
    }
    Ok(outputs)
}

/// The exporters to ask for.
pub(crate) fn exporters(outputs: &[OutputSpec]) -> Vec<Exporter> {
    outputs
        .iter()
        .map(|output| Exporter { r#type: output.kind.clone(), attrs: output.attrs.clone() })
        .collect()
}

/// The image layouts among the outputs.
pub(crate) fn layouts(outputs: &[OutputSpec]) -> impl Iterator<Item = &Path> {
    outputs.iter().filter_map(|output| match &output.target {
        Target::Layout(path) => Some(path.as_path()),
        _ => None,
    })
}

/// Offers the daemon what the outputs go into, caches, and further image layouts.
pub(crate) fn attach(
    outputs: &[OutputSpec],
    caches: &Caches,
    further: impl Iterator<Item = ContentDir>,
    attachables: &mut Attachables,
) {
    attachables.export(targets(outputs));
    let layouts = layouts(outputs).map(|path| ContentDir { name: STORE.into(), path: path.to_owned() });
    let stores: Vec<ContentDir> = layouts.chain(caches.stores().iter().cloned()).chain(further).collect();
    if !stores.is_empty() {
        attachables.content(stores);
    }
}

/// Where the daemon's answers go, by exporter.
fn targets(outputs: &[OutputSpec]) -> Vec<Option<ExportTarget>> {
    outputs
        .iter()
        .map(|output| match output.target.clone() {
            // A layout is filled through another service.
            Target::None | Target::Layout(_) => None,
            Target::Dir { path, mirror } => Some(ExportTarget::Dir { path, mirror }),
            Target::Stdout => {
                Some(ExportTarget::Bytes(Box::new(|| Ok(Box::pin(tokio::io::stdout()) as Output))))
            }
            Target::File(path) => Some(ExportTarget::Bytes(Box::new(move || Whole::create(&path)))),
        })
        .collect()
}

/// A file that takes its name only once it is complete.
struct Whole {
    file: tokio::fs::File,
    temporary: Option<(PathBuf, PathBuf)>,
}

impl Whole {
    fn create(path: &Path) -> io::Result<Output> {
        if path.symlink_metadata().is_ok_and(|meta| !meta.is_file()) {
            // A device, a pipe or a link is written to, not replaced.
            let file = File::options().write(true).create(true).truncate(true).open(path)?;
            return Ok(Box::pin(Self { file: file.into(), temporary: None }));
        }
        let name =
            path.file_name().ok_or_else(|| io::Error::other(format!("{} names no file", path.display())))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}", kiln_session::new_id()));
        let temporary = path.with_file_name(hidden);
        let open = File::options().write(true).create_new(true).open(&temporary);
        let file =
            open.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        Ok(Box::pin(Self { file: file.into(), temporary: Some((temporary, path.to_owned())) }))
    }
}

impl Drop for Whole {
    fn drop(&mut self) {
        if let Some((temporary, _)) = &self.temporary {
            let _ = std::fs::remove_file(temporary);
        }
    }
}

impl AsyncWrite for Whole {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.file).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.file).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        std::task::ready!(Pin::new(&mut self.file).poll_shutdown(cx))?;
        if let Some((temporary, path)) = &self.temporary {
            std::fs::rename(temporary, path)?;
            self.temporary = None;
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    fn parse(flags: &[String]) -> Result<Vec<OutputSpec>, CliError> {
        super::parse(flags, Docker::Load)
    }

    fn attrs(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn shorthands_and_types() {
        let parsed = parse(&[
            "out".into(),
            "type=registry,name=r/x".into(),
            "type=oci,dest=a.tar,compression=zstd".into(),
            "type=local,dest=d,mode=delete".into(),
            "type=cacheonly".into(),
        ])
        .unwrap();
        let dir = |path: &str, mirror| Target::Dir { path: path.into(), mirror };
        assert_eq!(
            parsed,
            [
                OutputSpec { kind: "local".into(), attrs: attrs(&[]), target: dir("out", false) },
                OutputSpec {
                    kind: "image".into(),
                    attrs: attrs(&[("name", "r/x"), ("push", "true")]),
                    target: Target::None
                },
                OutputSpec {
                    kind: "oci".into(),
                    attrs: attrs(&[("compression", "zstd")]),
                    target: Target::File("a.tar".into())
                },
                OutputSpec {
                    kind: "local".into(),
                    attrs: attrs(&[("mode", "delete")]),
                    target: dir("d", true)
                },
            ]
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (flag, expected) in [
            ("dest=x", "no type"),
            ("type=local", "no dest"),
            ("type=docker", "unsupported: type=docker without dest"),
            ("type=oci,tar=false", "tar=false is for images with a dest"),
            ("type=tar,dest=x,tar=false", "tar=false is for images"),
            ("type=image,dest=x", "takes no dest"),
            ("type=oci,dest=/", "is a directory"),
            ("type=oci,dest=/no/such/dir/file", "no directory /no/such/dir"),
            ("type=image,name=a b", "invalid image name \"a b\""),
        ] {
            let error = parse(&[flag.into()]).unwrap_err().to_string();
            assert!(error.contains(expected), "{flag}: {error}");
        }
        let stdout = OutputSpec { kind: "tar".into(), attrs: attrs(&[]), target: Target::Stdout };
        assert!(complete(vec![stdout.clone(), stdout], false, &[], &[]).is_err());
        assert!(complete(Vec::new(), true, &[], &[]).unwrap_err().to_string().contains("-t NAME"));
        let layout = || parse(&["type=oci,dest=x,tar=false".into()]).unwrap().remove(0);
        assert_eq!(layouts(&[layout()]).collect::<Vec<_>>(), [Path::new("x")]);
        assert!(complete(vec![layout(), layout()], false, &[], &[]).is_err());
        let digest = format!("a@sha256:{}", "0".repeat(64));
        for tag in ["a:b:c", "Upper", digest.as_str()] {
            let error = complete(Vec::new(), false, &[tag.into()], &[]).unwrap_err().to_string();
            assert!(error.contains("invalid image name"), "{tag}: {error}");
        }
    }

    #[test]
    fn tags_name_images_and_push_makes_one() {
        let outputs = parse(&["type=oci,dest=x".into()]).unwrap();
        let outputs =
            complete(outputs, true, &["a:1".into(), "b".into()], &["k=v".into(), "index:i=w".into()])
                .unwrap();
        let shared = [("name", "a:1,b"), ("annotation.k", "v"), ("annotation-index.i", "w")];
        assert_eq!(outputs[0].attrs, attrs(&shared));
        let mut pushed = attrs(&shared);
        pushed.insert("push".into(), "true".into());
        assert_eq!((outputs[1].kind.as_str(), &outputs[1].attrs), ("image", &pushed));
    }

    #[tokio::test]
    async fn a_file_appears_only_when_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.tar");
        let mut half = Whole::create(&path).unwrap();
        half.write_all(b"half").await.unwrap();
        drop(half);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let mut whole = Whole::create(&path).unwrap();
        whole.write_all(b"whole").await.unwrap();
        whole.shutdown().await.unwrap();
        drop(whole);
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        let error = Whole::create(Path::new("/no/such/dir/file")).err().unwrap();
        assert!(error.to_string().contains("/no/such/dir/file"), "{error}");
    }
}
