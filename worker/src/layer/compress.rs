//! Compression of blobs, and digests over what passes through.
//!
//! Output depends only on the input and the level, never on the number of processors.

use std::io::{self, BufRead, BufReader, Read, Write};

use flate2::{Compress, Crc, FlushCompress};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// How a layer blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// A plain tar.
    Uncompressed,
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
}

impl Compression {
    /// The name that exporter attributes use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Uncompressed => "uncompressed",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }

    /// Media type of a layer in this form, among those of OCI or of Docker.
    pub fn media_type(self, oci: bool) -> &'static str {
        match (self, oci) {
            (Self::Uncompressed, true) => "application/vnd.oci.image.layer.v1.tar",
            (Self::Gzip, true) => "application/vnd.oci.image.layer.v1.tar+gzip",
            (Self::Zstd, true) => "application/vnd.oci.image.layer.v1.tar+zstd",
            (Self::Uncompressed, false) => "application/vnd.docker.image.rootfs.diff.tar",
            (Self::Gzip, false) => "application/vnd.docker.image.rootfs.diff.tar.gzip",
            (Self::Zstd, false) => "application/vnd.docker.image.rootfs.diff.tar.zstd",
        }
    }

    /// The levels that this form knows.
    pub fn levels(self) -> std::ops::RangeInclusive<i32> {
        match self {
            Self::Uncompressed => 0..=0,
            Self::Gzip => 0..=9,
            Self::Zstd => 0..=22,
        }
    }
}

/// The compression that a layer's media type states; `None` if it states none that is known.
pub fn media_compression(media_type: &str) -> Option<Compression> {
    let base = media_type.split(';').next().unwrap_or_default().trim();
    Some(match base {
        "application/vnd.oci.image.layer.v1.tar"
        | "application/vnd.oci.image.layer.nondistributable.v1.tar"
        | "application/vnd.docker.image.rootfs.diff.tar"
        | "application/vnd.docker.image.rootfs.foreign.diff.tar" => Compression::Uncompressed,
        "application/vnd.oci.image.layer.v1.tar+gzip"
        | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
        | "application/vnd.docker.image.rootfs.diff.tar.gzip"
        | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => Compression::Gzip,
        "application/vnd.oci.image.layer.v1.tar+zstd"
        | "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
        | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Compression::Zstd,
        _ => return None,
    })
}

/// Size of the pieces that gzip compresses side by side. Part of the output: never change it lightly.
const GZIP_BLOCK: usize = 1 << 20;
const GZIP_LEVEL: i32 = 6;
const ZSTD_LEVEL: i32 = 3;
/// Any number but zero gives the same bytes.
const ZSTD_WORKERS: u32 = 2;

/// Compresses what is written to it.
pub enum Compressor<W: Write> {
    /// Hands bytes on.
    Plain(W),
    /// Deflate blocks of fixed size, compressed on several threads, in one gzip member.
    Gzip(Gzip<W>),
    /// A zstd frame.
    Zstd(zstd::stream::write::Encoder<'static, W>),
}

impl<W: Write> Compressor<W> {
    /// Compresses into `out`; `level` outside [`Compression::levels`] is an error.
    pub fn new(out: W, compression: Compression, level: Option<i32>) -> io::Result<Self> {
        if let Some(level) = level
            && compression != Compression::Uncompressed
            && !compression.levels().contains(&level)
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("compression level {level} is not one of {}'s", compression.as_str()),
            ));
        }
        Ok(match compression {
            Compression::Uncompressed => Self::Plain(out),
            Compression::Gzip => Self::Gzip(Gzip::new(out, level.unwrap_or(GZIP_LEVEL))?),
            Compression::Zstd => {
                let mut encoder = zstd::stream::write::Encoder::new(out, level.unwrap_or(ZSTD_LEVEL))?;
                encoder.multithread(ZSTD_WORKERS)?;
                encoder.include_checksum(true)?;
                Self::Zstd(encoder)
            }
        })
    }

    /// Writes the end of the stream and gives back what it went into.
    pub fn finish(self) -> io::Result<W> {
        match self {
            Self::Plain(mut out) => {
                out.flush()?;
                Ok(out)
            }
            Self::Gzip(gzip) => gzip.finish(),
            Self::Zstd(encoder) => encoder.finish(),
        }
    }
}

impl<W: Write> Write for Compressor<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(out) => out.write(data),
            Self::Gzip(gzip) => gzip.write(data),
            Self::Zstd(encoder) => encoder.write(data),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        // Forcing out a partial block would make the output depend on the caller's rhythm.
        Ok(())
    }
}

/// A gzip member whose deflate blocks are compressed in parallel: each block is independent and ends
/// byte-aligned (sync flush), so they can be joined as they are.
pub struct Gzip<W> {
    out: W,
    level: flate2::Compression,
    blocks: Vec<Vec<u8>>,
    batch: usize,
    crc: Crc,
}

impl<W: Write> Gzip<W> {
    fn new(mut out: W, level: i32) -> io::Result<Self> {
        // No name, no time, unknown system.
        out.write_all(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff])?;
        Ok(Self {
            out,
            level: flate2::Compression::new(level as u32),
            blocks: Vec::new(),
            batch: rayon::current_num_threads() * 2,
            crc: Crc::new(),
        })
    }

    fn drain(&mut self) -> io::Result<()> {
        let level = self.level;
        let done: Vec<io::Result<(Vec<u8>, Crc)>> =
            self.blocks.par_iter().map(|block| deflate_block(block, level)).collect();
        for block in done {
            let (bytes, crc) = block?;
            self.out.write_all(&bytes)?;
            self.crc.combine(&crc);
        }
        self.blocks.clear();
        Ok(())
    }

    fn finish(mut self) -> io::Result<W> {
        self.drain()?;
        // An empty final block, then the checksum and the length modulo 2^32.
        self.out.write_all(&[0x03, 0x00])?;
        self.out.write_all(&self.crc.sum().to_le_bytes())?;
        self.out.write_all(&self.crc.amount().to_le_bytes())?;
        self.out.flush()?;
        Ok(self.out)
    }
}

impl<W: Write> Write for Gzip<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.blocks.last().is_none_or(|block| block.len() == GZIP_BLOCK) {
            if self.blocks.len() == self.batch {
                self.drain()?;
            }
            self.blocks.push(Vec::with_capacity(GZIP_BLOCK));
        }
        let Some(block) = self.blocks.last_mut() else { return Ok(0) };
        let n = data.len().min(GZIP_BLOCK - block.len());
        block.extend_from_slice(&data[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn deflate_block(block: &[u8], level: flate2::Compression) -> io::Result<(Vec<u8>, Crc)> {
    let mut crc = Crc::new();
    crc.update(block);
    let mut deflate = Compress::new(level, false);
    let mut out = Vec::with_capacity(block.len() / 2 + 1024);
    loop {
        let rest = &block[deflate.total_in() as usize..];
        deflate.compress_vec(rest, &mut out, FlushCompress::Sync).map_err(io::Error::other)?;
        // Room left over means that everything, the flush included, came out.
        if deflate.total_in() as usize == block.len() && out.len() < out.capacity() {
            return Ok((out, crc));
        }
        out.reserve(block.len() / 2 + 1024);
    }
}

/// Decompresses a blob; the form is told by its first bytes, as media types in the wild are not always true.
pub enum Decompressor<R: Read> {
    /// A plain tar.
    Plain(BufReader<R>),
    /// One or more gzip members.
    Gzip(Box<flate2::bufread::MultiGzDecoder<BufReader<R>>>),
    /// One or more zstd frames.
    Zstd(Box<zstd::stream::read::Decoder<'static, BufReader<R>>>),
}

impl<R: Read> Decompressor<R> {
    /// Reads as much as tells the form.
    pub fn new(reader: R) -> io::Result<Self> {
        let mut reader = BufReader::with_capacity(128 << 10, reader);
        let start = reader.fill_buf()?;
        Ok(if start.starts_with(&[0x1f, 0x8b]) {
            Self::Gzip(Box::new(flate2::bufread::MultiGzDecoder::new(reader)))
        } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
            Self::Zstd(Box::new(zstd::stream::read::Decoder::with_buffer(reader)?))
        } else {
            Self::Plain(reader)
        })
    }

    /// The compressed stream, with whatever of it was read ahead lost.
    pub fn into_inner(self) -> R {
        match self {
            Self::Plain(reader) => reader.into_inner(),
            Self::Gzip(decoder) => decoder.into_inner().into_inner(),
            Self::Zstd(decoder) => decoder.finish().into_inner(),
        }
    }
}

impl<R: Read> Read for Decompressor<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(reader) => reader.read(buffer),
            Self::Gzip(decoder) => decoder.read(buffer),
            Self::Zstd(decoder) => decoder.read(buffer),
        }
    }
}

/// Counts and digests (sha256) what passes, reading or writing.
pub struct DigestWriter<T> {
    inner: T,
    digest: Sha256,
    count: u64,
}

impl<T> DigestWriter<T> {
    /// Starts at zero bytes.
    pub fn new(inner: T) -> Self {
        Self { inner, digest: Sha256::new(), count: 0 }
    }

    /// The inner stream, `sha256:…` of what passed, and how many bytes it was.
    pub fn finish(self) -> (T, String, u64) {
        (self.inner, format!("sha256:{}", hex::encode(self.digest.finalize())), self.count)
    }
}

impl<W: Write> Write for DigestWriter<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(data)?;
        self.digest.update(&data[..n]);
        self.count += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<R: Read> Read for DigestWriter<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.digest.update(&buffer[..n]);
        self.count += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn media_types_are_understood() {
        for form in [Compression::Uncompressed, Compression::Gzip, Compression::Zstd] {
            for oci in [true, false] {
                assert_eq!(media_compression(form.media_type(oci)), Some(form), "{}", form.media_type(oci));
            }
        }
    }
}
