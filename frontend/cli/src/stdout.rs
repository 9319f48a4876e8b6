//! Answers on standard output.

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
