//! Answers on standard output.

use std::borrow::Cow;
use std::io::{ErrorKind, Write};

use crate::error::CliError;

/// Prints `text`. A reader that has seen enough, such as `head`, is no failure.
pub(crate) fn print(text: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(CliError::file("write", "standard output", error))
        }
        _ => Ok(()),
    }
}

/// What others named, for a terminal: characters that would steer it are shown as escapes.
pub(crate) fn harmless(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return Cow::Borrowed(text);
    }
    let shown = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    Cow::Owned(text.chars().map(shown).collect())
}
