//! The copy action: from one root to another, with patterns, owners and modes.
//!
//! The walk keeps its own stack, so a source's depth can't exhaust the thread's. A directory that is only
//! on the way to an included path is made when the first such path is met.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use kiln_proto::pattern::{self, MatchInfo, PatternMatcher};
use kiln_proto::pb;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, Timespec};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::actions::{FileError, timestamp};
use super::again::Only;
use super::crew::{Crew, Ending, Job, Target};
use super::modestr::ModeChange;
use super::root::{
    NewDir, Owner, PathError, Place, Root, clean, lstat, open_child, open_subdir, read_names, remove_all,
    split,
};
use super::transfer::{Links, Style, hard_link};
use super::{unpack, wildcard};

const DEFAULT_DIR_MODE: u32 = 0o755;

/// What is known of a copy's source beside the action.
#[derive(Debug, Default)]
pub(crate) struct Origin {
    /// Just this is copied, of a source without patterns: the rest is there already.
    pub(crate) only: Option<Only>,
    /// See [`Style::link`].
    pub(crate) link: bool,
}

/// Copies what `action` names from `src` onto `dst`.
pub(crate) fn copy(
    src: Root<'_>,
    dst: Root<'_>,
    action: &pb::FileActionCopy,
    owner: Option<Owner>,
    from: Origin,
    cancel: &CancellationToken,
) -> Result<(), FileError> {
    if !action.create_dest_path {
        dst.place(&action.dest, true).map_err(|errno| {
            format!(
                "failed to stat {}: {}",
                action.dest,
                PathError::new("lstat", split(Path::new(&clean(&action.dest))).0, errno)
            )
        })?;
    }
    let sources = match action.allow_wildcard {
        true => wildcard::resolve(src, &action.src)?,
        false => vec![clean(&action.src).into()],
    };
    if sources.is_empty() {
        return match action.allow_empty_wildcard {
            true => Ok(()),
            false => Err(FileError::Text(format!("{} not found", clean(&action.src)))),
        };
    }
    let options = Options { from, ..Options::new(action, owner)? };
    let mut required = Required::new(&action.required_paths);
    for source in &sources {
        if action.attempt_unpack_docker_compatibility
            && unpack::unpack(src, source, dst, &action.dest, owner, options.time, cancel)?
        {
            continue;
        }
        copy_one(src, source, dst, &action.dest, &options, &mut required, cancel)?;
    }
    required.check()
}

struct Options {
    owner: Option<Owner>,
    time: Option<Timespec>,
    mode: Option<ModeChange>,
    dir_contents: bool,
    follow: bool,
    replace: bool,
    include: Option<PatternMatcher>,
    exclude: Option<PatternMatcher>,
    new_dir: NewDir,
    from: Origin,
}

impl Options {
    fn new(action: &pb::FileActionCopy, owner: Option<Owner>) -> Result<Self, FileError> {
        let mode = match (action.mode_str.as_str(), action.mode) {
            ("", -1) => None,
            ("", mode) => Some(ModeChange::Set(mode as u32 & 0o7777)),
            (text, _) => Some(ModeChange::parse(text)?),
        };
        let time = timestamp(action.timestamp);
        // Only a numeric mode is for directories that are made on the way.
        let dir_mode = if action.mode_str.is_empty() && action.mode != -1 {
            action.mode as u32
        } else {
            DEFAULT_DIR_MODE
        };
        Ok(Self {
            owner,
            time,
            mode,
            dir_contents: action.dir_copy_contents,
            follow: action.follow_symlink,
            replace: action.always_replace_existing_dest_paths,
            include: matcher(&action.include_patterns, "includepatterns")?,
            exclude: matcher(&action.exclude_patterns, "excludepatterns")?,
            new_dir: NewDir { mode: dir_mode & 0o7777, owner, time },
            from: Origin::default(),
        })
    }
}

fn matcher(patterns: &[String], what: &str) -> Result<Option<PatternMatcher>, FileError> {
    if patterns.is_empty() {
        return Ok(None);
    }
    PatternMatcher::new(patterns)
        .map(Some)
        .map_err(|err| FileError::Text(format!("invalid {what}: {patterns:?}: {err}")))
}

/// Paths beneath the input's root at or below which something has to be copied.
struct Required(Vec<(String, bool)>);

impl Required {
    fn new(paths: &[String]) -> Self {
        Self(paths.iter().map(|path| (clean(path), false)).collect())
    }

    fn saw(&mut self, source: &Path, rel: &[u8]) {
        for (path, seen) in self.0.iter_mut().filter(|(_, seen)| !seen) {
            *seen = source.join(OsStr::from_bytes(rel)).starts_with(path);
        }
    }

    fn check(&self) -> Result<(), FileError> {
        match self.0.iter().find(|(_, seen)| !seen) {
            Some((path, _)) => Err(FileError::Text(format!("{path:?}: not found"))),
            None => Ok(()),
        }
    }
}

fn copy_one(
    src: Root<'_>,
    source: &Path,
    dst: Root<'_>,
    dest: &str,
    options: &Options,
    required: &mut Required,
    cancel: &CancellationToken,
) -> Result<(), FileError> {
    let dest_clean = clean(dest);
    let into_dir = dest.ends_with('/') || dest.ends_with("/.") || dest.is_empty();
    let dest_clean = Path::new(&dest_clean);
    let ensure = if into_dir { dest_clean } else { split(dest_clean).0 };
    let mkdir_failed = |errno| PathError::new("mkdir", ensure, errno);
    let (_, made_before) = dst.ensure_dir(ensure, &options.new_dir).map_err(mkdir_failed)?;

    let lstat_failed = |errno| PathError::new("lstat", source, errno);
    let from = src.place(source, options.follow).map_err(lstat_failed)?;
    let Some(from_stat) = from.stat else { return Err(lstat_failed(Errno::NOENT).into()) };
    let dest_failed = |errno| PathError::new("mkdir", dest_clean, errno);
    let mut to = dst.place(dest_clean, true).map_err(dest_failed)?;
    let below = match (from.is_dir(), options.dir_contents) {
        (true, true) => false,
        (true, false) => to.stat.is_some(),
        (false, _) => to.is_dir(),
    };
    let mut made = None;
    if below {
        let dir = open_subdir(to.dir.as_fd(), &to.name).map_err(dest_failed)?;
        let name = split(source).1.to_owned();
        let stat = lstat(dir.as_fd(), &name).map_err(dest_failed)?;
        to = Place { dir, name, stat };
    } else if from.is_dir() && options.dir_contents && to.stat.is_none() {
        made = Some(dst.ensure_dir(dest_clean, &options.new_dir).map_err(dest_failed)?.1);
        to = dst.place(dest_clean, true).map_err(dest_failed)?;
    }

    let style = Style {
        owner: options.owner,
        mode: options.mode.clone(),
        time: options.time,
        link: options.from.link,
    };
    let crew = Crew::new(style);
    let dir = rustix::io::fcntl_dupfd_cloexec(&to.dir, 0).map_err(dest_failed)?;
    let below = crew.target(dir, Vec::new(), None, None);
    let links = Links::default();
    let copier =
        Copier { crew, options, required, cancel, links, stack: Vec::new(), source, base: &to, below };
    copier.run(&from, from_stat)?;
    for made in made.iter().chain([&made_before]) {
        made.restore_times(options.time).map_err(mkdir_failed)?;
    }
    Ok(())
}

/// A directory's path for messages, which go on with a slash.
fn shown(dir: &Path) -> String {
    dir.to_string_lossy().trim_end_matches('/').to_owned()
}

/// A directory that is being copied.
struct Frame {
    src: Arc<OwnedFd>,
    stat: Stat,
    /// Not there yet if the directory itself is not included.
    dst: Option<Arc<Target>>,
    /// Its name in the frame before (or in the base).
    name: OsString,
    /// Its metadata is copied when its content is, also if it was there before.
    apply: bool,
    /// It was made by this copy, so nothing can stand in the way in it.
    made: bool,
    /// The source's path, for messages.
    shown: Arc<str>,
    /// Path below the source, for patterns.
    rel: Vec<u8>,
    names: std::vec::IntoIter<OsString>,
    include: MatchInfo,
    exclude: MatchInfo,
}

struct Copier<'a> {
    /// Goes first: when the copy breaks off nobody goes on with it.
    crew: Crew,
    options: &'a Options,
    required: &'a mut Required,
    cancel: &'a CancellationToken,
    links: Links,
    stack: Vec<Frame>,
    source: &'a Path,
    base: &'a Place,
    /// The base's directory.
    below: Arc<Target>,
}

impl Copier<'_> {
    fn run(mut self, from: &Place, stat: Stat) -> Result<(), FileError> {
        self.entry(from.dir.as_fd(), &from.name, Some(stat))?;
        while let Some(frame) = self.stack.last_mut() {
            if self.cancel.is_cancelled() {
                return Err(FileError::Cancelled);
            }
            match frame.names.next() {
                Some(name) => {
                    let dir = frame.src.clone();
                    self.entry(dir.as_fd(), &name, None)?;
                }
                // Its target ends when all files in it are there.
                None => drop(self.stack.pop()),
            }
        }
        let Self { crew, below, .. } = self;
        drop(below);
        crew.finish()
    }

    fn failed(&self, call: &'static str, name: &OsStr, errno: Errno) -> PathError {
        let path = match self.stack.last() {
            Some(frame) => format!("{}/{}", frame.shown, name.to_string_lossy()),
            None => shown(self.source),
        };
        PathError { call, path, source: errno }
    }

    /// Copies one entry; a directory is only pushed onto the stack.
    fn entry(&mut self, src_dir: BorrowedFd<'_>, name: &OsStr, top: Option<Stat>) -> Result<(), FileError> {
        let (mut included, mut excluded) = (true, false);
        let (mut include, mut exclude) = (MatchInfo::default(), MatchInfo::default());
        let mut rel = Vec::new();
        if let Some(parent) = self.stack.last() {
            rel = match parent.rel.as_slice() {
                b"" => name.as_bytes().to_vec(),
                dir => [dir, b"/", name.as_bytes()].concat(),
            };
            let text = pattern::text(&rel);
            if let Some(matcher) = &self.options.include {
                (included, include) = matcher.matches_below(&text, Some(&parent.include));
            }
            if let Some(matcher) = &self.options.exclude {
                (excluded, exclude) = matcher.matches_below(&text, Some(&parent.exclude));
                included &= !excluded;
            }
        }
        let stat = match top {
            Some(stat) => stat,
            None => match lstat(src_dir, name).map_err(|e| self.failed("lstat", name, e))? {
                Some(stat) => stat,
                None => return Err(self.failed("lstat", name, Errno::NOENT).into()),
            },
        };
        let kind = FileType::from_raw_mode(stat.st_mode);
        if included && !rel.is_empty() {
            self.required.saw(self.source, &rel);
        }
        if let Some(only) = self.options.from.only.as_ref().filter(|_| !rel.is_empty())
            && !(only.has(&rel) || kind == FileType::Directory && only.leads_on(&rel))
        {
            return Ok(());
        }
        if kind == FileType::Directory {
            let leads_on = |matcher: &Option<PatternMatcher>, judge: fn(&PatternMatcher, &str) -> bool| {
                matcher.as_ref().is_some_and(|matcher| judge(matcher, &pattern::text(&rel)))
            };
            let taken_back = || leads_on(&self.options.exclude, PatternMatcher::may_reinclude_below);
            let wanted_below = || leads_on(&self.options.include, PatternMatcher::may_match_below);
            if (excluded && !taken_back()) || (!excluded && !included && !wanted_below()) {
                return Ok(());
            }
            return self.enter(src_dir, name, stat, included, rel, include, exclude);
        }
        if !included {
            return Ok(());
        }
        self.make_parents()?;
        let target = self.target_name(name).to_owned();
        let (dst, made) = match self.stack.last() {
            Some(Frame { dst: Some(dst), made, .. }) => (dst.clone(), *made),
            Some(_) => return Err(self.failed("open", name, Errno::NOENT).into()),
            None => (self.below.clone(), false),
        };
        if !made {
            self.clear_target(dst.fd().as_fd(), &target)?;
        }
        self.leaf(src_dir, name, stat, dst, target)
    }

    fn target_name<'n>(&'n self, name: &'n OsStr) -> &'n OsStr {
        if self.stack.is_empty() { &self.base.name } else { name }
    }

    #[allow(clippy::too_many_arguments)]
    fn enter(
        &mut self,
        src_dir: BorrowedFd<'_>,
        name: &OsStr,
        stat: Stat,
        included: bool,
        rel: Vec<u8>,
        include: MatchInfo,
        exclude: MatchInfo,
    ) -> Result<(), FileError> {
        let src = open_child(src_dir, name, OFlags::RDONLY | OFlags::DIRECTORY)
            .map_err(|e| self.failed("open", name, e))?;
        let names = read_names(src.as_fd()).map_err(|e| self.failed("read", name, e))?;
        let top = self.stack.is_empty();
        let shown = match rel.is_empty() {
            true => shown(self.source),
            false => shown(&self.source.join(OsStr::from_bytes(&rel))),
        };
        let frame = Frame {
            src: Arc::new(src),
            stat,
            dst: None,
            name: self.target_name(name).to_owned(),
            apply: included && !top,
            made: false,
            shown: shown.into(),
            rel,
            names: names.into_iter(),
            include,
            exclude,
        };
        self.stack.push(frame);
        if included { self.make_parents() } else { Ok(()) }
    }

    /// Makes the target directories of all open frames that have none yet.
    fn make_parents(&mut self) -> Result<(), FileError> {
        for depth in 0..self.stack.len() {
            if self.stack[depth].dst.is_some() {
                continue;
            }
            let parent = match depth {
                0 => self.base.dir.as_fd(),
                _ => match &self.stack[depth - 1].dst {
                    Some(dst) => dst.fd().as_fd(),
                    None => continue,
                },
            };
            let name = self.stack[depth].name.clone();
            let failed = |errno| PathError::new("mkdir", &name, errno);
            let mut there = lstat(parent, &name).map_err(failed)?;
            let is_dir = |stat: &Stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            if let Some(stat) = &there
                && !is_dir(stat)
            {
                if !self.options.replace {
                    return Err(FileError::Text(format!(
                        "cannot copy to non-directory: {}",
                        self.target_path(depth)
                    )));
                }
                remove_all(parent, &name).map_err(failed)?;
                there = None;
            }
            if there.is_none() {
                rustix::fs::mkdirat(parent, &name, Mode::from_raw_mode(0o700)).map_err(failed)?;
            }
            let dst = open_child(parent, &name, OFlags::RDONLY | OFlags::DIRECTORY).map_err(failed)?;
            let above = depth.checked_sub(1).and_then(|above| self.stack[above].dst.clone());
            let frame = &mut self.stack[depth];
            frame.made = there.is_none();
            let ending = match frame.apply || frame.made {
                true => Ending::Dress { from: frame.src.clone(), stat: frame.stat },
                false => Ending::Time(frame.stat),
            };
            frame.dst = Some(self.crew.target(dst, frame.rel.clone(), Some(ending), above));
        }
        Ok(())
    }

    /// A target's path for messages.
    fn target_path(&self, depth: usize) -> String {
        self.stack[..=depth].iter().map(|frame| format!("/{}", frame.name.to_string_lossy())).collect()
    }

    /// Removes what stands where something that is no directory goes.
    fn clear_target(&self, dst: BorrowedFd<'_>, name: &OsStr) -> Result<(), FileError> {
        let failed = |errno| PathError::new("remove", name, errno);
        let Some(stat) = lstat(dst, name).map_err(failed)? else { return Ok(()) };
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Ok(rustix::fs::unlinkat(dst, name, AtFlags::empty()).map_err(failed)?);
        }
        if self.options.replace {
            return Ok(remove_all(dst, name).map_err(failed)?);
        }
        Err(FileError::Text(format!("cannot replace to directory {} with file", name.to_string_lossy())))
    }

    fn leaf(
        &mut self,
        src: BorrowedFd<'_>,
        name: &OsStr,
        stat: Stat,
        dst: Arc<Target>,
        target: OsString,
    ) -> Result<(), FileError> {
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            let done = self.crew.style().special(src, name, &stat, dst.fd().as_fd(), &target);
            return done.map_err(|(call, errno)| self.failed(call, name, errno).into());
        }
        let names = self.stack.iter().skip(1).map(|frame| frame.name.as_os_str());
        let path = || names.chain([target.as_os_str()]).collect();
        if let Some(first) = self.links.find(&stat, path) {
            // It may be on its way still.
            self.crew.wait()?;
            let root = self.stack.first().and_then(|frame| frame.dst.as_ref()).unwrap_or(&dst);
            let done = hard_link(root.fd().as_fd(), first, dst.fd().as_fd(), &target);
            return done.map_err(|(call, errno)| self.failed(call, name, errno).into());
        }
        let (src, dir) = match self.stack.last() {
            Some(frame) => (frame.src.clone(), frame.shown.clone()),
            None => {
                let src = rustix::io::fcntl_dupfd_cloexec(src, 0).map_err(|e| self.failed("dup", name, e))?;
                (Arc::new(src), shown(split(self.source).0).into())
            }
        };
        self.crew.copy(Job { src, name: name.to_owned(), stat, dst, target, dir })
    }
}
