//! Writing tar entries in PAX form: plain ustar headers, with PAX records only for what does not fit.

use std::io::{self, Read, Write};

use tar::{EntryType, Header};

use super::tar_read::Kind;

const BLOCK: usize = 512;
/// Largest value of the seven octal digits that ids have in a ustar header.
const MAX_ID: u64 = 0o7777777;
/// Largest value of the eleven octal digits that sizes and times have.
const MAX_NUMBER: u64 = 0o77777777777;

/// Header of an entry to write.
#[derive(Debug, Clone)]
pub struct TarEntry<'a> {
    /// Relative path; a directory's ends with a slash.
    pub path: &'a [u8],
    /// What it is.
    pub kind: Kind,
    /// Target of a link.
    pub link: &'a [u8],
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time: seconds since the epoch.
    pub mtime: i64,
    /// Modification time: nanoseconds.
    pub mtime_nanos: u32,
    /// Bytes of content that follow.
    pub size: u64,
    /// Device numbers.
    pub device: (u32, u32),
    /// Extended attributes, in the order in which they are written.
    pub xattrs: &'a [(Vec<u8>, Vec<u8>)],
}

impl<'a> TarEntry<'a> {
    /// An entry owned by root at the epoch.
    pub fn new(path: &'a [u8], kind: Kind, mode: u32) -> Self {
        Self {
            path,
            kind,
            link: b"",
            mode,
            uid: 0,
            gid: 0,
            mtime: 0,
            mtime_nanos: 0,
            size: 0,
            device: (0, 0),
            xattrs: &[],
        }
    }
}

/// Writes an archive, entry by entry.
pub struct TarWriter<W> {
    out: W,
}

impl<W: Write> TarWriter<W> {
    /// Starts an archive.
    pub fn new(out: W) -> Self {
        Self { out }
    }

    /// Writes an entry with exactly `entry.size` bytes of `content`; a shorter content is an error.
    pub fn entry(&mut self, entry: &TarEntry<'_>, content: &mut dyn Read) -> io::Result<()> {
        self.header(entry)?;
        let copied = io::copy(&mut content.take(entry.size), &mut self.out)?;
        if copied != entry.size {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!(
                    "{}: file became shorter while it was read ({copied} of {} bytes)",
                    String::from_utf8_lossy(entry.path),
                    entry.size
                ),
            ));
        }
        self.pad(entry.size)
    }

    /// Writes the end marker and gives the output back.
    pub fn finish(mut self) -> io::Result<W> {
        self.out.write_all(&[0; BLOCK * 2])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn pad(&mut self, size: u64) -> io::Result<()> {
        let padding = (size.wrapping_neg() % BLOCK as u64) as usize;
        self.out.write_all(&[0; BLOCK][..padding])
    }

    fn header(&mut self, entry: &TarEntry<'_>) -> io::Result<()> {
        let mut records: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
        let mut record = |key: &str, value: String| records.push((key.into(), value.into_bytes()));
        let mut header = Header::new_ustar();
        header.set_entry_type(match entry.kind {
            Kind::Regular => EntryType::Regular,
            Kind::HardLink => EntryType::Link,
            Kind::Symlink => EntryType::Symlink,
            Kind::Dir => EntryType::Directory,
            Kind::Char => EntryType::Char,
            Kind::Block => EntryType::Block,
            Kind::Fifo => EntryType::Fifo,
        });
        header.set_mode(entry.mode & 0o7777);
        let mut id = |key: &str, value: u32| {
            if u64::from(value) > MAX_ID {
                record(key, value.to_string());
                return 0;
            }
            u64::from(value)
        };
        header.set_uid(id("uid", entry.uid));
        header.set_gid(id("gid", entry.gid));
        if entry.size > MAX_NUMBER {
            record("size", entry.size.to_string());
        }
        header.set_size(if entry.size > MAX_NUMBER { 0 } else { entry.size });
        let fits = u64::try_from(entry.mtime).is_ok_and(|s| s <= MAX_NUMBER);
        header.set_mtime(if fits { entry.mtime as u64 } else { 0 });
        if !fits || entry.mtime_nanos != 0 {
            record("mtime", pax_time(entry.mtime, entry.mtime_nanos));
        }
        if matches!(entry.kind, Kind::Char | Kind::Block) {
            header.set_device_major(entry.device.0)?;
            header.set_device_minor(entry.device.1)?;
        }
        if let Some(ustar) = header.as_ustar_mut() {
            if !put_path(ustar, entry.path) {
                records.push((b"path".to_vec(), entry.path.to_vec()));
                put(&mut ustar.name, &ascii(entry.path));
            }
            if entry.link.len() > ustar.linkname.len() || !entry.link.is_ascii() {
                records.push((b"linkpath".to_vec(), entry.link.to_vec()));
                put(&mut ustar.linkname, &ascii(entry.link));
            } else {
                put(&mut ustar.linkname, entry.link);
            }
        }
        for (key, value) in entry.xattrs {
            records.push(([b"SCHILY.xattr.", key.as_slice()].concat(), value.clone()));
        }
        header.set_cksum();
        if !records.is_empty() {
            records.sort();
            self.extended(entry.path, &records)?;
        }
        self.out.write_all(header.as_bytes())
    }

    fn extended(&mut self, path: &[u8], records: &[(Vec<u8>, Vec<u8>)]) -> io::Result<()> {
        let mut data = Vec::new();
        for (key, value) in records {
            // The stated length counts its own digits.
            let rest = key.len() + value.len() + 3;
            let mut length = rest + rest.to_string().len();
            if rest + length.to_string().len() != length {
                length = rest + length.to_string().len();
            }
            data.extend_from_slice(format!("{length} ").as_bytes());
            data.extend_from_slice(key);
            data.push(b'=');
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::XHeader);
        header.set_mode(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(data.len() as u64);
        if let Some(ustar) = header.as_ustar_mut() {
            let trimmed = path.strip_suffix(b"/").unwrap_or(path);
            let base = trimmed.rsplit(|b| *b == b'/').next().unwrap_or_default();
            put(&mut ustar.name, &ascii(&[b"PaxHeaders.0/", base].concat()));
        }
        header.set_cksum();
        self.out.write_all(header.as_bytes())?;
        self.out.write_all(&data)?;
        self.pad(data.len() as u64)
    }
}

/// Stores a path in name and prefix; false if it needs a PAX record.
fn put_path(header: &mut tar::UstarHeader, path: &[u8]) -> bool {
    if !path.is_ascii() || path.contains(&0) {
        return false;
    }
    if path.len() <= header.name.len() {
        put(&mut header.name, path);
        return true;
    }
    // The longest prefix that leaves a non-empty name.
    let limit = header.prefix.len().min(path.len().saturating_sub(2));
    let Some(slash) = path[..=limit].iter().rposition(|b| *b == b'/') else { return false };
    if slash == 0 || slash > header.prefix.len() || path.len() - slash - 1 > header.name.len() {
        return false;
    }
    put(&mut header.prefix, &path[..slash]);
    put(&mut header.name, &path[slash + 1..]);
    true
}

fn put(field: &mut [u8], value: &[u8]) {
    let n = field.len().min(value.len());
    field.fill(0);
    field[..n].copy_from_slice(&value[..n]);
}

/// What readers without PAX see of a name.
fn ascii(path: &[u8]) -> Vec<u8> {
    path.iter().map(|b| if b.is_ascii() && *b != 0 { *b } else { b'_' }).collect()
}

fn pax_time(seconds: i64, nanos: u32) -> String {
    if nanos == 0 {
        return seconds.to_string();
    }
    // A negative time counts its fraction backwards from the next second.
    let (sign, whole, fraction) = if seconds < 0 {
        ("-", seconds.unsigned_abs() - 1, 1_000_000_000 - nanos)
    } else {
        ("", seconds.unsigned_abs(), nanos)
    };
    let text = format!("{sign}{whole}.{fraction:09}");
    text.trim_end_matches('0').to_string()
}
