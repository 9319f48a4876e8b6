//! What the file of a URL is called.

use percent_encoding::percent_decode_str;
use url::Url;

/// Where nothing else gives a name.
const DEFAULT: &str = "download";

/// The name that was asked for, or that the answer gives, or that the URL ends with.
pub(super) fn file_name(url: &Url, asked: &str, disposition: Option<&str>) -> String {
    if !asked.is_empty() {
        return safe(asked);
    }
    if let Some(name) = disposition.and_then(attachment).filter(|name| !name.ends_with('/')) {
        return safe(&name);
    }
    safe(&percent_decode_str(url.path()).decode_utf8_lossy())
}

/// The last component of a path, if it can be the name of a file.
fn safe(path: &str) -> String {
    let name = path.trim().trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    match name {
        "" | "." | ".." => DEFAULT.to_owned(),
        _ if name.chars().any(char::is_control) => DEFAULT.to_owned(),
        _ => name.to_owned(),
    }
}

/// The file name in a `Content-Disposition` header (RFC 6266); the extended form goes before the plain one.
fn attachment(header: &str) -> Option<String> {
    let (mut plain, mut extended) = (None, None);
    let mut rest = header.split_once(';')?.1;
    while let Some((name, after)) = rest.split_once('=') {
        let (value, after) = parameter(after.trim_start());
        match name.trim().to_ascii_lowercase().as_str() {
            "filename" => plain = Some(value),
            "filename*" => extended = decode_extended(&value),
            _ => {}
        }
        rest = after;
    }
    extended.or(plain).filter(|name| !name.is_empty())
}

/// A value, bare or quoted, and what follows the semicolon after it.
fn parameter(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let (value, rest) = text.split_once(';').unwrap_or((text, ""));
        return (value.trim().to_owned(), rest);
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => {
                let rest = &quoted[at + 1..];
                return (value, rest.split_once(';').map_or("", |(_, rest)| rest));
            }
            '\\' => value.extend(chars.next().map(|(_, c)| c)),
            _ => value.push(c),
        }
    }
    (value, "")
}

/// `UTF-8'language'percent-encoded`.
fn decode_extended(value: &str) -> Option<String> {
    let (charset, rest) = value.split_once('\'')?;
    let (_, text) = rest.split_once('\'')?;
    let bytes = percent_decode_str(text);
    match charset.to_ascii_lowercase().as_str() {
        "utf-8" | "us-ascii" => bytes.decode_utf8().ok().map(|text| text.into_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_in_their_directory() {
        for (url, asked, disposition, name) in [
            ("http://h/dir/foo.txt", "", None, "foo.txt"),
            ("http://h/dir/", "", None, "dir"),
            ("http://h", "", None, "download"),
            ("http://h/a%20b?query=x", "", None, "a b"),
            ("http://h/%2e%2e%2f", "", None, "download"),
            ("http://h/a%2fb", "", None, "b"),
            ("http://h/a%0ab", "", None, "download"),
            ("http://h/foo", "../bar", None, "bar"),
            ("http://h/foo", "..", None, "download"),
            ("http://h/foo", "asked", Some("attachment; filename=given"), "asked"),
            ("http://h/foo", "", Some("attachment; filename=given.txt"), "given.txt"),
            ("http://h/foo", "", Some("attachment; x=1; FileName=\"a; \\\"b\\\".txt\"; y"), "a; \"b\".txt"),
            ("http://h/foo", "", Some("attachment; filename=\"../../etc/passwd\""), "passwd"),
            (
                "http://h/foo",
                "",
                Some("attachment; filename=plain; filename*=UTF-8''na%C3%AFve%20file"),
                "naïve file",
            ),
            ("http://h/foo", "", Some("attachment; filename*=latin'x"), "foo"),
            ("http://h/foo", "", Some("attachment; filename=\"dir/\""), "foo"),
            ("http://h/foo", "", Some("inline"), "foo"),
        ] {
            let url = Url::parse(url).expect("a URL");
            assert_eq!(file_name(&url, asked, disposition), name, "{url} {asked} {disposition:?}");
        }
    }
}
