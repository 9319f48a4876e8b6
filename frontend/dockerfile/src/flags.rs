//! `--name=value` words of an instruction.

use std::collections::BTreeMap;

use crate::error::{Fault, Result};
use crate::source::Flag;
use crate::suggest::with_suggestion;

/// What a flag takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Takes {
    Bool,
    Text,
    /// A text; may be repeated.
    List,
}

/// The flags of one instruction, checked against those it knows.
#[derive(Debug, Default)]
pub(crate) struct Flags {
    values: BTreeMap<&'static str, Vec<String>>,
}

impl Flags {
    pub(crate) fn parse(given: &[Flag], known: &[(&'static str, Takes)]) -> Result<Self> {
        let mut flags = Self::default();
        for flag in given {
            flags.add(&flag.text, known).map_err(|f| f.at(flag.at))?;
        }
        Ok(flags)
    }

    fn add(&mut self, text: &str, known: &[(&'static str, Takes)]) -> Result<()> {
        let (dashed, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (text, None),
        };
        let name = dashed.trim_start_matches("--");
        let Some(&(name, takes)) = known.iter().find(|(n, _)| *n == name) else {
            let names = known.iter().map(|(n, _)| n);
            return Err(with_suggestion(format!("unknown flag: {dashed}"), name, names, true).into());
        };
        let value = match (takes, value) {
            (Takes::Bool, None) => "true".to_string(),
            (_, None) | (Takes::Bool, Some("")) => {
                return Err(Fault::new(format!("missing a value on flag: {dashed}")));
            }
            (Takes::Bool, Some(value)) => match value.to_ascii_lowercase().as_str() {
                value @ ("true" | "false") => value.to_string(),
                _ => {
                    return Err(Fault::new(format!(
                        "expecting boolean value for flag {dashed}, not: {value}"
                    )));
                }
            },
            (_, Some(value)) => value.to_string(),
        };
        let values = self.values.entry(name).or_default();
        if takes != Takes::List && !values.is_empty() {
            return Err(Fault::new(format!("duplicate flag specified: {dashed}")));
        }
        values.push(value);
        Ok(())
    }

    /// The text of a flag, empty if it is not given.
    pub(crate) fn text(&self, name: &str) -> String {
        self.values.get(name).and_then(|v| v.first()).cloned().unwrap_or_default()
    }

    pub(crate) fn list(&self, name: &str) -> Vec<String> {
        self.values.get(name).cloned().unwrap_or_default()
    }

    /// What a boolean flag was set to, if it was.
    pub(crate) fn bool(&self, name: &str) -> Option<bool> {
        self.values.get(name).and_then(|v| v.first()).map(|v| v == "true")
    }

    pub(crate) fn is_set(&self, name: &str) -> bool {
        self.bool(name) == Some(true)
    }
}
