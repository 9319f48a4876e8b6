//! Where a build's files come from: the build context and the Dockerfile are directories here, at a URL that the
//! daemon fetches, or on standard input.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use kiln_session::client::{Attachables, SharedDir};
use sha2::{Digest, Sha256};

use crate::csv;
use crate::error::CliError;

/// The file that keeps what came on standard input.
const UPLOADED: &str = "uploaded";
const DOCKERFILE: &str = "Dockerfile";

/// The build context and the Dockerfile.
#[derive(Debug)]
pub(crate) struct Inputs {
    context: BuildContext,
    /// Where the Dockerfile is, if it is not in a context that the daemon gets as a whole.
    dockerfile_dir: Option<PathBuf>,
    filename: String,
    /// Holds a Dockerfile that came on standard input.
    _stdin: Option<TempDir>,
}

#[derive(Debug)]
enum BuildContext {
    Directory(PathBuf),
    /// A URL, which the daemon fetches.
    Remote(String),
    /// What came on standard input: an archive, or a Dockerfile alone; the daemon finds out. It is kept, as a build may
    /// be tried again. The daemon asks for it by its id.
    Upload {
        id: String,
        dir: TempDir,
    },
}

impl Inputs {
    /// Looks up what the flags name.
    pub(crate) fn find(context: &str, file: Option<&Path>) -> Result<Self, CliError> {
        if context == "-" && file == Some(Path::new("-")) {
            return Err(CliError::usage("standard input can't be both build context and Dockerfile"));
        }
        let context = BuildContext::find(context)?;
        let (mut dockerfile_dir, mut filename, mut stdin) = (None, DOCKERFILE.to_owned(), None);
        match (file, &context) {
            (None, BuildContext::Directory(dir)) => dockerfile_dir = Some(dir.clone()),
            (None, _) => {}
            (Some(file), _) if file == Path::new("-") => {
                let mut text = Vec::new();
                std::io::stdin()
                    .read_to_end(&mut text)
                    .map_err(|error| CliError::file("read", "standard input", error))?;
                dockerfile_dir = Some(stdin.insert(TempDir::with_dockerfile(&text)?).0.clone());
            }
            (Some(file), BuildContext::Directory(_)) => {
                let found = dockerfile(file)?;
                let failed = |error| CliError::file("read Dockerfile", file, error);
                if let Some((dir, name)) = found {
                    (dockerfile_dir, filename) = (Some(dir), name);
                } else {
                    // A pipe can be read once only, and not by a transfer.
                    let text = std::fs::read(file).map_err(failed)?;
                    dockerfile_dir = Some(stdin.insert(TempDir::with_dockerfile(&text)?).0.clone());
                }
            }
            (Some(file), _) => file.to_str().ok_or_else(|| unnamed(file))?.clone_into(&mut filename),
        }
        Ok(Self { context, dockerfile_dir, filename, _stdin: stdin })
    }

    /// Hands over what came on standard input; gives the directories to share.
    pub(crate) fn share(&self, attachables: &mut Attachables) -> Result<Vec<SharedDir>, CliError> {
        let mut shared = Vec::new();
        let mut add = |name: &str, path: &Path| {
            shared.push(SharedDir { name: name.into(), path: path.to_owned() });
        };
        match &self.context {
            BuildContext::Directory(path) => add("context", path),
            BuildContext::Remote(_) => {}
            BuildContext::Upload { id, dir } => {
                let path = dir.0.join(UPLOADED);
                let file =
                    std::fs::File::open(&path).map_err(|error| CliError::file("read", &path, error))?;
                attachables.upload(id, file);
            }
        }
        if let Some(path) = &self.dockerfile_dir {
            add("dockerfile", path);
        }
        Ok(shared)
    }

    /// The frontend's options (wire: dockerfile-frontend.md §1).
    pub(crate) fn attrs(&self) -> HashMap<String, String> {
        let mut attrs = HashMap::from([("filename".to_owned(), self.filename.clone())]);
        let url = match &self.context {
            BuildContext::Directory(_) => return attrs,
            BuildContext::Remote(url) => url.clone(),
            BuildContext::Upload { id, .. } => format!("http://buildkit-session/{id}"),
        };
        attrs.insert("context".to_owned(), url);
        if self.dockerfile_dir.is_some() {
            attrs.insert("dockerfilekey".to_owned(), "dockerfile".to_owned());
        }
        attrs
    }

    /// Says "the same directory of the same machine", so that the daemon asks for changed files only.
    pub(crate) fn shared_key(&self) -> String {
        let path = match &self.context {
            BuildContext::Directory(path) => path.canonicalize().unwrap_or_else(|_| path.clone()),
            BuildContext::Remote(url) => PathBuf::from(url),
            BuildContext::Upload { dir, .. } => dir.0.clone(),
        };
        let machine = std::fs::read("/etc/machine-id").unwrap_or_default();
        let mut hash = Sha256::new();
        hash.update(&machine);
        hash.update(path.as_os_str().as_encoded_bytes());
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let name: String = name.chars().map(|c| if c.is_ascii_graphic() { c } else { '_' }).collect();
        format!("{name}:{}", &hex::encode(hash.finalize())[..16])
    }
}

impl BuildContext {
    fn find(text: &str) -> Result<Self, CliError> {
        if text == "-" {
            let dir = TempDir::new()?;
            let path = dir.0.join(UPLOADED);
            std::fs::File::create_new(&path)
                .and_then(|mut file| std::io::copy(&mut std::io::stdin().lock(), &mut file))
                .map_err(|error| CliError::file("write", &path, error))?;
            return Ok(Self::Upload { id: kiln_session::new_id(), dir });
        }
        let path = PathBuf::from(text);
        if !path.exists() {
            let refused =
                |why: &dyn std::fmt::Display| CliError::usage(format!("build context {text:?}: {why}"));
            if is_remote(text).map_err(|error| refused(&error))? {
                return Ok(Self::Remote(text.to_owned()));
            }
            if text.contains("://") {
                let what = "unsupported: not a git repository, nor a file that is fetched by http";
                return Err(refused(&what));
            }
        }
        directory(&path, "read build context")?;
        Ok(Self::Directory(path))
    }
}

/// Whether the daemon fetches a context; an error if the text is meant to be a git repository, and is none.
pub(crate) fn is_remote(text: &str) -> Result<bool, String> {
    let is_http = text.starts_with("http://") || text.starts_with("https://");
    Ok(kiln_dockerfile::git_context(text, &HashMap::new())?.is_some() || is_http)
}

/// Refuses what is no directory.
pub(crate) fn directory(path: &Path, action: &'static str) -> Result<(), CliError> {
    let meta = path.metadata().map_err(|error| CliError::file(action, path, error))?;
    match meta.is_dir() {
        true => Ok(()),
        false => Err(CliError::usage(format!("{} is not a directory", path.display()))),
    }
}

/// `NAME=DIR` flags.
pub(crate) fn locals(flags: &[String]) -> Result<Vec<SharedDir>, CliError> {
    let mut all = Vec::new();
    for flag in flags {
        for (name, path) in csv::pairs(flag)? {
            let path = PathBuf::from(path);
            directory(&path, "read directory")?;
            all.push(SharedDir { name, path });
        }
    }
    Ok(all)
}

fn unnamed(file: &Path) -> CliError {
    CliError::usage(format!("{} names no Dockerfile", file.display()))
}

/// The directory to share and the Dockerfile's name in it; `None` if it is no regular file.
fn dockerfile(file: &Path) -> Result<Option<(PathBuf, String)>, CliError> {
    let failed = |error| CliError::file("read Dockerfile", file, error);
    let name = file.file_name().and_then(|name| name.to_str()).ok_or_else(|| unnamed(file))?;
    let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let meta = file.metadata().map_err(failed)?;
    if meta.is_dir() {
        return Err(failed(std::io::Error::other("is a directory")));
    }
    if !meta.is_file() {
        return Ok(None);
    }
    let target = file.canonicalize().map_err(failed)?;
    // A link that leads out of its directory would not be found there.
    if file.is_symlink()
        && !target.starts_with(dir.canonicalize().map_err(failed)?)
        && let (Some(parent), Some(name)) =
            (target.parent(), target.file_name().and_then(|name| name.to_str()))
    {
        return Ok(Some((parent.to_owned(), name.to_owned())));
    }
    Ok(Some((dir.to_owned(), name.to_owned())))
}

/// A private directory, removed when dropped.
#[derive(Debug)]
struct TempDir(PathBuf);

impl TempDir {
    fn new() -> Result<Self, CliError> {
        use std::os::unix::fs::DirBuilderExt;
        let path = std::env::temp_dir().join(format!("kiln-{}", kiln_session::new_id()));
        let made = std::fs::DirBuilder::new().mode(0o700).create(&path);
        made.map_err(|error| CliError::file("make directory", &path, error))?;
        Ok(Self(path))
    }

    fn with_dockerfile(text: &[u8]) -> Result<Self, CliError> {
        let dir = Self::new()?;
        let file = dir.0.join(DOCKERFILE);
        std::fs::write(&file, text).map_err(|error| CliError::file("write", &file, error))?;
        Ok(dir)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(flags: &[&str], context: &str) -> Result<Inputs, CliError> {
        Inputs::find(context, flags.first().map(Path::new))
    }

    #[test]
    fn what_is_not_there_is_named_before_anything_is_built() {
        for (file, context, expected) in [
            (None, "/no/such/context", "/no/such/context"),
            (None, "/dev/null", "is not a directory"),
            (Some("/no/such/Dockerfile"), "/", "/no/such/Dockerfile"),
            (Some("-"), "-", "both build context and Dockerfile"),
            (None, "ftp://example.org/x.tar", "unsupported: not a git repository"),
            (None, "https://example.org/x.git?a=b", "unexpected query"),
        ] {
            let error = find(file.as_slice(), context).expect_err("refused").to_string();
            assert!(error.contains(expected), "{context}: {error}");
        }
    }

    #[test]
    fn a_remote_context_is_the_daemons_affair() {
        for url in
            ["https://example.org/x.git#main:dir", "https://example.org/x.tar", "git@x:y", "github.com/x/y"]
        {
            let inputs = find(&["sub/Dockerfile"], url).unwrap();
            let attrs = inputs.attrs();
            assert_eq!((&*attrs["context"], &*attrs["filename"]), (url, "sub/Dockerfile"));
            assert!(!attrs.contains_key("dockerfilekey"));
            assert!(inputs.share(&mut Attachables::new()).unwrap().is_empty());
        }
    }

    #[test]
    fn the_shared_key_names_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::create_dir(&a).unwrap();
        std::fs::create_dir(&b).unwrap();
        let key = |path: &Path| find(&[], path.to_str().unwrap()).unwrap().shared_key();
        assert_eq!(key(&a), key(&a.join("../a")));
        assert_ne!(key(&a), key(&b));
        assert!(key(&a).starts_with("a:"));
    }
}
