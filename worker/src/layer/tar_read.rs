//! Reading entries of a tar stream: ustar, GNU and PAX, with every sparse form.
//!
//! Header blocks are decoded by the `tar` crate. Its archive iterator is not used: it splits PAX
//! records at newlines instead of by their length, so a binary xattr value ends the record list, and
//! a size record after it is lost, which shifts every entry that follows.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use tar::{EntryType, GnuExtSparseHeader, Header};

use super::LayerError;

/// A name and its value: a PAX record or an extended attribute.
pub(super) type Pair = (Vec<u8>, Vec<u8>);

const BLOCK: usize = 512;
/// Longest extension headers (PAX records, long names) that one entry may have, all together.
const MAX_EXTENSION: u64 = 1 << 20;
/// Most pieces of data that one sparse file may have.
const MAX_PIECES: usize = 1 << 20;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A file with data.
    Regular,
    /// Another name for an earlier entry, `link`.
    HardLink,
    /// A symlink to `link`.
    Symlink,
    /// A directory.
    Dir,
    /// A character device.
    Char,
    /// A block device.
    Block,
    /// A named pipe.
    Fifo,
}

/// One entry's header, with its extensions applied.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Path as written.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Target of a link.
    pub link: Vec<u8>,
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
    /// Size of the file's content, holes included.
    pub size: u64,
    /// Device numbers.
    pub device: (u32, u32),
    /// Extended attributes.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Iterates the entries of a tar stream.
pub struct TarReader<R> {
    reader: R,
    /// Bytes of the current entry's data that are still in the stream.
    data: u64,
    /// Zero bytes after it.
    padding: u64,
    /// Pieces (offset, length) of a sparse file.
    pieces: Option<Vec<(u64, u64)>>,
    size: u64,
    buffer: Vec<u8>,
}

#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    records: Vec<Pair>,
    /// Bytes of the headers that all this came in.
    size: u64,
}

impl Extensions {
    fn get(&self, key: &str) -> Option<&[u8]> {
        self.records.iter().rev().find(|(k, _)| k == key.as_bytes()).map(|(_, value)| value.as_slice())
    }

    fn number(&self, key: &str) -> Result<Option<u64>, LayerError> {
        self.get(key)
            .map(|value| decimal(value).ok_or_else(|| bad(format!("pax record {key} is not a number"))))
            .transpose()
    }
}

fn bad(text: impl Into<String>) -> LayerError {
    LayerError::Archive(text.into())
}

fn decimal(value: &[u8]) -> Option<u64> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

impl<R: Read> TarReader<R> {
    /// Reads from the start of an uncompressed archive.
    pub fn new(reader: R) -> Self {
        Self { reader, data: 0, padding: 0, pieces: None, size: 0, buffer: vec![0; 256 << 10] }
    }

    /// The next entry; what was not read of the one before is skipped. `None` at the end marker
    /// or where the stream ends between entries.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, LayerError> {
        let mut extensions = Extensions::default();
        loop {
            self.skip(self.data.saturating_add(self.padding))?;
            (self.data, self.padding, self.pieces) = (0, 0, None);
            let mut block = [0u8; BLOCK];
            if !self.read_block(&mut block)? || block.iter().all(|b| *b == 0) {
                return Ok(None);
            }
            let header = Header::from_byte_slice(&block);
            check(header, &block)?;
            let physical = header.entry_size().map_err(|e| bad(e.to_string()))?;
            match header.entry_type() {
                EntryType::XHeader => {
                    let data = self.extension(physical, &mut extensions)?;
                    extensions.records.extend(pax_records(&data)?);
                }
                EntryType::XGlobalHeader => {
                    self.extension(physical, &mut extensions)?;
                }
                EntryType::GNULongName => {
                    extensions.path = Some(until_nul(self.extension(physical, &mut extensions)?));
                }
                EntryType::GNULongLink => {
                    extensions.link = Some(until_nul(self.extension(physical, &mut extensions)?));
                }
                _ => return self.entry(header, &extensions, physical).map(Some),
            }
        }
    }

    fn entry(
        &mut self,
        header: &Header,
        extensions: &Extensions,
        physical: u64,
    ) -> Result<Entry, LayerError> {
        let text = |e: io::Error| bad(e.to_string());
        let mut path = match extensions.get("path").map(<[u8]>::to_vec).or_else(|| extensions.path.clone()) {
            Some(path) => path,
            None => header.path_bytes().into_owned(),
        };
        if let Some(name) = extensions.get("GNU.sparse.name") {
            path = name.to_vec();
        }
        let link = match extensions.get("linkpath").map(<[u8]>::to_vec).or_else(|| extensions.link.clone()) {
            Some(link) => link,
            None => header.link_name_bytes().map(|l| l.into_owned()).unwrap_or_default(),
        };
        let shown = String::from_utf8_lossy(&path).into_owned();
        let kind = match header.entry_type() {
            EntryType::Regular if path.ends_with(b"/") => Kind::Dir,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::Regular,
            EntryType::Link => Kind::HardLink,
            EntryType::Symlink => Kind::Symlink,
            EntryType::Char => Kind::Char,
            EntryType::Block => Kind::Block,
            EntryType::Directory => Kind::Dir,
            EntryType::Fifo => Kind::Fifo,
            other => {
                return Err(bad(format!("{shown}: unsupported: tar entry type {:#04x}", other.as_byte())));
            }
        };
        let id = |key: &str, fallback: io::Result<u64>| -> Result<u32, LayerError> {
            let value = match extensions.number(key)? {
                Some(value) => value,
                None => fallback.map_err(text)?,
            };
            u32::try_from(value).map_err(|_| bad(format!("{shown}: {key} {value} is out of range")))
        };
        let (mtime, mtime_nanos) = match extensions.get("mtime") {
            Some(value) => pax_time(value).ok_or_else(|| bad(format!("{shown}: bad modification time")))?,
            None => (header.mtime().map_err(text)? as i64, 0),
        };
        // Links may state the size of what they name; no data follows them.
        self.data = match kind {
            Kind::Regular => extensions.number("size")?.unwrap_or(physical),
            Kind::HardLink | Kind::Symlink => 0,
            _ => physical,
        };
        self.padding = padding(self.data);
        self.size = self.data;
        if header.entry_type() == EntryType::GNUSparse {
            self.gnu_sparse(header).map_err(|e| prefix(&shown, e))?;
        } else if kind == Kind::Regular {
            self.pax_sparse(extensions).map_err(|e| prefix(&shown, e))?;
        }
        let device = match kind {
            Kind::Char | Kind::Block => (
                header.device_major().map_err(text)?.unwrap_or(0),
                header.device_minor().map_err(text)?.unwrap_or(0),
            ),
            _ => (0, 0),
        };
        let xattrs = extensions
            .records
            .iter()
            .filter_map(|(key, value)| Some((key.strip_prefix(b"SCHILY.xattr.")?.to_vec(), value.clone())))
            .collect();
        Ok(Entry {
            kind,
            link,
            mode: header.mode().map_err(text)? & 0o7777,
            uid: id("uid", header.uid())?,
            gid: id("gid", header.gid())?,
            mtime,
            mtime_nanos,
            size: if kind == Kind::Regular { self.size } else { 0 },
            device,
            xattrs,
            path,
        })
    }

    /// Pieces of the old GNU form: four in the header, the rest in blocks that follow it.
    fn gnu_sparse(&mut self, header: &Header) -> Result<(), LayerError> {
        let text = |e: io::Error| bad(e.to_string());
        let gnu = header.as_gnu().ok_or_else(|| bad("sparse entry without a GNU header"))?;
        let mut pieces = Vec::new();
        for piece in gnu.sparse.iter().filter(|p| !p.is_empty()) {
            pieces.push((piece.offset().map_err(text)?, piece.length().map_err(text)?));
        }
        let mut more = gnu.is_extended();
        while more {
            let mut block = GnuExtSparseHeader::new();
            if !self.read_block(block.as_mut_bytes())? {
                return Err(bad("archive ends within a sparse map"));
            }
            for piece in block.sparse().iter().filter(|p| !p.is_empty()) {
                pieces.push((piece.offset().map_err(text)?, piece.length().map_err(text)?));
            }
            if pieces.len() > MAX_PIECES {
                return Err(bad("sparse map is too long"));
            }
            more = block.is_extended();
        }
        let size = gnu.real_size().map_err(text)?;
        self.set_pieces(pieces, size)
    }

    /// Pieces of the PAX forms 0.0 and 0.1 (in records) and 1.0 (before the data).
    fn pax_sparse(&mut self, extensions: &Extensions) -> Result<(), LayerError> {
        let size = match extensions.number("GNU.sparse.realsize")? {
            Some(size) => Some(size),
            None => extensions.number("GNU.sparse.size")?,
        };
        let mut numbers = Vec::new();
        if extensions.get("GNU.sparse.major") == Some(b"1")
            && extensions.get("GNU.sparse.minor") == Some(b"0")
        {
            numbers = self.map_before_data()?;
        } else if let Some(map) = extensions.get("GNU.sparse.map") {
            for number in map.split(|b| *b == b',').filter(|n| !n.is_empty()) {
                numbers.push(decimal(number).ok_or_else(|| bad("sparse map is not numeric"))?);
            }
        } else if extensions.get("GNU.sparse.numblocks").is_some() {
            for (key, value) in &extensions.records {
                if key == b"GNU.sparse.offset" || key == b"GNU.sparse.numbytes" {
                    numbers.push(decimal(value).ok_or_else(|| bad("sparse map is not numeric"))?);
                }
            }
        } else {
            return Ok(());
        }
        if numbers.len() % 2 != 0 {
            return Err(bad("sparse map has an odd number of values"));
        }
        let size = size.ok_or_else(|| bad("sparse file without its size"))?;
        self.set_pieces(numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect(), size)
    }

    fn map_before_data(&mut self) -> Result<Vec<u64>, LayerError> {
        let mut numbers: Vec<u64> = Vec::new();
        let mut wanted = None;
        let mut digits = Vec::new();
        while wanted.is_none_or(|n| numbers.len() < n) {
            let mut block = [0u8; BLOCK];
            if self.data < BLOCK as u64 || !self.read_block(&mut block)? {
                return Err(bad("archive ends within a sparse map"));
            }
            self.data -= BLOCK as u64;
            for byte in block {
                if byte != b'\n' {
                    digits.push(byte);
                    if digits.len() > 20 && wanted.is_none_or(|n| numbers.len() < n) {
                        return Err(bad("sparse map is not numeric"));
                    }
                    continue;
                }
                if wanted.is_some_and(|n| numbers.len() >= n) {
                    break;
                }
                let number = decimal(&digits).ok_or_else(|| bad("sparse map is not numeric"))?;
                digits.clear();
                match wanted {
                    None if number as usize > MAX_PIECES => return Err(bad("sparse map is too long")),
                    None => wanted = Some(number as usize * 2),
                    Some(_) => numbers.push(number),
                }
            }
        }
        Ok(numbers)
    }

    fn set_pieces(&mut self, pieces: Vec<(u64, u64)>, size: u64) -> Result<(), LayerError> {
        let mut end = 0;
        let mut stored = 0u64;
        for &(offset, length) in &pieces {
            let last = offset.checked_add(length).filter(|last| offset >= end && *last <= size);
            end = last.ok_or_else(|| bad("sparse map is out of order or beyond the file's end"))?;
            stored += length;
        }
        if stored != self.data {
            return Err(bad(format!("sparse map covers {stored} bytes, the entry has {}", self.data)));
        }
        self.padding = padding(self.data);
        self.size = size;
        self.pieces = Some(pieces);
        Ok(())
    }

    /// Writes the current entry's content to an empty file; holes stay holes.
    pub fn copy_to(&mut self, file: &File) -> Result<(), CopyError> {
        let pieces = self.pieces.take().unwrap_or_else(|| vec![(0, self.data)]);
        for (offset, length) in pieces {
            let mut at = offset;
            let end = offset + length;
            while at < end {
                let want = self.buffer.len().min((end - at) as usize);
                let n = match self.reader.read(&mut self.buffer[..want]) {
                    Ok(0) => return Err(CopyError::Read(bad("archive ends within a file"))),
                    Ok(n) => n,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(CopyError::Read(LayerError::Read(error))),
                };
                self.data -= n as u64;
                file.write_all_at(&self.buffer[..n], at).map_err(CopyError::Write)?;
                at += n as u64;
            }
        }
        file.set_len(self.size).map_err(CopyError::Write)
    }

    /// Reads what follows the end marker, so that a digest over the stream covers all of it.
    pub fn finish(mut self) -> Result<R, LayerError> {
        loop {
            match self.reader.read(&mut self.buffer) {
                Ok(0) => return Ok(self.reader),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(LayerError::Read(error)),
            }
        }
    }

    fn extension(&mut self, size: u64, before: &mut Extensions) -> Result<Vec<u8>, LayerError> {
        before.size = before.size.saturating_add(size);
        if before.size > MAX_EXTENSION {
            return Err(bad(format!("extension headers of {} bytes are too long", before.size)));
        }
        let mut data = vec![0; size as usize];
        self.reader.read_exact(&mut data).map_err(cut)?;
        self.padding = padding(size);
        Ok(data)
    }

    /// Fills a block; false where the stream ends before its first byte.
    fn read_block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool, LayerError> {
        let mut have = 0;
        while have < BLOCK {
            match self.reader.read(&mut block[have..]) {
                Ok(0) if have == 0 => return Ok(false),
                Ok(0) => return Err(bad("archive ends within a header")),
                Ok(n) => have += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(LayerError::Read(error)),
            }
        }
        Ok(true)
    }

    fn skip(&mut self, mut count: u64) -> Result<(), LayerError> {
        while count > 0 {
            let want = self.buffer.len().min(count as usize);
            match self.reader.read(&mut self.buffer[..want]) {
                Ok(0) => return Err(bad("archive ends within an entry")),
                Ok(n) => count -= n as u64,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(LayerError::Read(error)),
            }
        }
        Ok(())
    }
}

/// Whether a stream starts with a header that its checksum holds for: an archive, whole or not.
pub(crate) fn is_archive(mut reader: impl Read) -> bool {
    let mut block = [0u8; BLOCK];
    let read = reader.read_exact(&mut block);
    read.is_ok() && block.iter().any(|b| *b != 0) && check(Header::from_byte_slice(&block), &block).is_ok()
}

/// Which side of [`TarReader::copy_to`] failed.
pub enum CopyError {
    /// The archive.
    Read(LayerError),
    /// The file.
    Write(io::Error),
}

fn prefix(path: &str, error: LayerError) -> LayerError {
    match error {
        LayerError::Archive(text) => bad(format!("{path}: {text}")),
        other => other,
    }
}

fn cut(error: io::Error) -> LayerError {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        bad("archive ends within an extension header")
    } else {
        LayerError::Read(error)
    }
}

fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

fn until_nul(mut data: Vec<u8>) -> Vec<u8> {
    if let Some(end) = data.iter().position(|b| *b == 0) {
        data.truncate(end);
    }
    data
}

fn check(header: &Header, block: &[u8; BLOCK]) -> Result<(), LayerError> {
    let sum: u32 =
        block.iter().enumerate().map(|(i, b)| if (148..156).contains(&i) { 32 } else { u32::from(*b) }).sum();
    match header.cksum() {
        Ok(stated) if stated == sum => Ok(()),
        _ => Err(bad("header checksum does not match (not a tar archive?)")),
    }
}

/// `LENGTH KEY=VALUE\n` records; a value may hold any byte.
fn pax_records(mut data: &[u8]) -> Result<Vec<Pair>, LayerError> {
    let malformed = || bad("malformed pax record");
    let mut records = Vec::new();
    while !data.is_empty() && data[0] != 0 {
        let space = data.iter().take(20).position(|b| *b == b' ').ok_or_else(malformed)?;
        let length = decimal(&data[..space]).ok_or_else(malformed)? as usize;
        if length <= space + 2 || length > data.len() || data[length - 1] != b'\n' {
            return Err(malformed());
        }
        let record = &data[space + 1..length - 1];
        let equals = record.iter().position(|b| *b == b'=').ok_or_else(malformed)?;
        records.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
        data = &data[length..];
    }
    Ok(records)
}

/// Seconds with an optional fraction, possibly negative.
fn pax_time(value: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanos: u32 = digits.parse().ok()?;
    if whole.starts_with('-') && nanos > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((seconds, nanos))
}
