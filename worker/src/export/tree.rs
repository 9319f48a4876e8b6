//! The `local` and `tar` exporters: the files of the result themselves.

use std::collections::{BTreeMap, HashMap};
use std::fs::{OpenOptions, Permissions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use kiln_cache::{Ref, ScratchDir, SnapshotRef};
use kiln_proto::{pattern, platform};
use rustix::fs::{FileType, Mode, OFlags, openat};

use super::archive::send;
use super::attestation::{Attestation, file_subjects, walk};
use super::attrs::{Attributes, Kind};
use super::input::ExportInput;
use super::output::{Output, Tree};
use super::{ExportContext, ExportError};
use crate::image::{BlobOptions, Images};
use crate::layer::{PackOptions, pack_dir};
use crate::view::{View, ViewError};

/// Readable trees of a result. They stay as long as this lives.
struct Roots {
    /// (directory in the output without slash, platform for progress texts, tree).
    views: Vec<(String, String, View)>,
    _scratch: Vec<ScratchDir>,
}

async fn roots(
    context: &ExportContext,
    attributes: &Attributes,
    input: &ExportInput,
) -> Result<Roots, ExportError> {
    let split = attributes.platform_split.unwrap_or(input.is_map);
    let mut targets = Vec::new();
    for target in &input.targets {
        context.images.materialize(&target.result, &context.access).await?;
        let shown = if input.is_map { target.id.clone() } else { String::new() };
        let id = match (&target.platform, target.id.is_empty()) {
            (_, false) => target.id.clone(),
            (Some(stated), true) => platform::format(stated),
            (None, true) => platform::format(&platform::host()),
        };
        let files: Vec<(String, Attestation)> = target
            .attestations
            .iter()
            .filter(|attestation| !attestation.inline_only)
            .map(|attestation| {
                let name = match input.is_map && !split {
                    true => attestation.file_of(&id),
                    false => attestation.file.clone(),
                };
                (format!("{}{name}", attributes.attestation_prefix), attestation.clone())
            })
            .collect();
        let prefix = if split { id.replace('/', "_") } else { String::new() };
        targets.push((prefix, shown, target.result.clone(), files));
    }
    let (context, epoch, options) = (context.clone(), attributes.epoch, attributes.blob_options());
    tokio::task::spawn_blocking(move || {
        let empty = context.store.scratch()?;
        let mut roots = Roots { views: Vec::new(), _scratch: Vec::new() };
        for (prefix, shown, result, files) in targets {
            let mut view = view(&context, &result, &empty)?;
            if !files.is_empty() {
                let (upper, work) = (context.store.scratch()?, context.store.scratch()?);
                let with = Stating { images: &context.images, options, epoch };
                write_statements(&view, &files, upper.path(), &with)?;
                view = View::writable(layers(&context, &result)?, upper.path(), work.path())?;
                roots._scratch.extend([upper, work]);
            }
            roots.views.push((prefix, shown, view));
        }
        if !split {
            check_disjoint(&roots.views)?;
        }
        roots._scratch.push(empty);
        Ok(roots)
    })
    .await?
}

/// Results that go into one directory have no file in common.
fn check_disjoint(views: &[(String, String, View)]) -> Result<(), ExportError> {
    let mut owners: HashMap<Vec<u8>, &str> = HashMap::new();
    for (_, platform, view) in views.iter().filter(|_| views.len() > 1) {
        let mut clash = None;
        walk(view.fd(), &mut |path, kind, _| {
            if kind != FileType::Directory
                && let Some(owner) = owners.insert(path.to_vec(), platform)
            {
                clash.get_or_insert_with(|| {
                    let path = pattern::text(path);
                    format!(
                        "cannot overwrite {path} from {owner} with that of {platform} when split option is disabled"
                    )
                });
            }
            Ok(())
        })?;
        if let Some(clash) = clash {
            return Err(ExportError::Input(clash));
        }
    }
    Ok(())
}

/// How statements are made.
struct Stating<'a> {
    images: &'a Images,
    options: BlobOptions,
    /// The time of their files.
    epoch: Option<i64>,
}

/// Writes what is claimed of the files in `view` to `directory`, which is laid over them.
fn write_statements(
    view: &View,
    files: &[(String, Attestation)],
    directory: &Path,
    with: &Stating<'_>,
) -> Result<(), ExportError> {
    let subjects = file_subjects(view.fd())?;
    std::fs::set_permissions(directory, Permissions::from_mode(0o755))?;
    for (name, attestation) in files {
        // The name is a client's; it must not lead elsewhere.
        if name.contains('/') || name == ".." || name == "." {
            return Err(ExportError::Attribute(format!("invalid name of an attestation's file: {name:?}")));
        }
        let text = serde_json::to_vec_pretty(&attestation.statement(&subjects, with.images, with.options)?)
            .map_err(|error| ExportError::Internal(error.to_string()))?;
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(directory.join(name))?;
        file.write_all(&text)?;
        if let Some(seconds) = with.epoch {
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
            file.set_modified(time)?;
        }
    }
    Ok(())
}

fn layers(context: &ExportContext, result: &Ref) -> Result<Vec<SnapshotRef>, ExportError> {
    Ok(match result {
        Some(top) => crate::flat::chain(&context.store.snapshots(), top)?,
        None => Vec::new(),
    })
}

fn view(context: &ExportContext, result: &Ref, empty: &ScratchDir) -> Result<View, ExportError> {
    let layers = layers(context, result)?;
    Ok(match layers.is_empty() {
        true => View::directory(empty.path(), Vec::new())?,
        false => View::read_only(layers, empty.path())?,
    })
}

pub(super) async fn export_local(
    context: &ExportContext,
    attributes: &Attributes,
    input: &ExportInput,
    output: &dyn Output,
) -> Result<BTreeMap<String, String>, ExportError> {
    let roots = roots(context, attributes, input).await?;
    if attributes.mirror {
        let trees =
            roots.views.iter().map(|(prefix, _, view)| tree(prefix, view)).collect::<Result<Vec<_>, _>>()?;
        copy(context, output, trees, true, "copying files").await?;
        return Ok(BTreeMap::new());
    }
    // Clients merge: one transfer for each platform.
    let transfers = roots.views.iter().map(|(prefix, shown, view)| async move {
        let id = format!("copying files {shown}");
        copy(context, output, vec![tree(prefix, view)?], false, id.trim_end()).await
    });
    futures::future::try_join_all(transfers).await?;
    Ok(BTreeMap::new())
}

fn tree(prefix: &str, view: &View) -> Result<Tree, ExportError> {
    let root = openat(view.fd(), ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|source| ViewError::Open { path: PathBuf::from("."), source })?;
    Ok(Tree { prefix: prefix.to_string(), root })
}

async fn copy(
    context: &ExportContext,
    output: &dyn Output,
    trees: Vec<Tree>,
    mirror: bool,
    id: &str,
) -> Result<(), ExportError> {
    let status = context.access.progress.as_ref().map(|p| p.status(id, "transferring", 0));
    let status = Arc::new(Mutex::new((status, std::time::Instant::now())));
    let progress = {
        let status = status.clone();
        Arc::new(move |bytes: u64| {
            let mut guard = status.lock().unwrap_or_else(PoisonError::into_inner);
            if guard.1.elapsed().as_millis() < 100 {
                return;
            }
            guard.1 = std::time::Instant::now();
            if let Some(status) = guard.0.as_mut() {
                status.update(bytes as i64);
            }
        })
    };
    output.directory(trees, mirror, progress).await?;
    if let Some(status) = status.lock().unwrap_or_else(PoisonError::into_inner).0.take() {
        status.done();
    }
    Ok(())
}

pub(super) async fn export_tar(
    context: &ExportContext,
    attributes: &Attributes,
    input: &ExportInput,
    output: &dyn Output,
) -> Result<BTreeMap<String, String>, ExportError> {
    debug_assert_eq!(attributes.kind, Kind::Tar);
    let roots = roots(context, attributes, input).await?;
    let clamp = attributes.epoch;
    let status = context.access.progress.as_ref().map(|p| p.status("sending tarball", "", 0));
    let tar = output.tar(&BTreeMap::new())?;
    send(tar, move |archive| {
        for (prefix, _, view) in &roots.views {
            let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
            let options = PackOptions { overlay: false, clamp, prefix };
            let dir = PathBuf::from(format!("/proc/self/fd/{}", view.fd().as_raw_fd()));
            pack_dir(&dir, &options, archive)?;
        }
        Ok(())
    })
    .await?;
    status.into_iter().for_each(kiln_solver::progress::StatusHandle::done);
    Ok(BTreeMap::new())
}
