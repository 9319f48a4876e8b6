//! Tables of `buildkitd.toml`, taken key by key, and what is said about a key that is not as it should be.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::{Table, Value};

use super::units::{DiskSpace, parse_duration};

/// Why a configuration was not taken.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("failed to read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not TOML.
    #[error("{}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What the parser says, with line and column.
        message: String,
    },
    /// A setting has a value of the wrong kind.
    #[error("{place}: {message}")]
    Value {
        /// The flag, or the file and the full name of the key.
        place: String,
        /// What is expected.
        message: String,
    },
    /// A setting asks for something that is not there.
    #[error("unsupported: {place}")]
    Unsupported {
        /// The flag, or the full name of the key and the file.
        place: String,
    },
}

/// What a command line flag sets over the file.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    /// Full name of the key, such as `worker.oci.gc`.
    pub key: &'static str,
    /// The flag, by which errors name it.
    pub flag: String,
    /// Its value; without one, what the file says is dropped. Tables are merged.
    pub value: Option<Value>,
}

/// Where values come from.
pub(super) struct Origin<'a> {
    pub(super) path: &'a Path,
    /// Keys that flags have set.
    flags: BTreeMap<&'static str, String>,
}

impl<'a> Origin<'a> {
    /// Puts flags over the table of the file at `path`.
    pub(super) fn new(
        path: &'a Path,
        table: &mut Table,
        settings: Vec<Setting>,
    ) -> Result<Self, ConfigError> {
        let mut flags = BTreeMap::new();
        for Setting { key, flag, value } in settings {
            let mut place = &mut *table;
            let (parents, last) = key.rsplit_once('.').unwrap_or(("", key));
            for name in parents.split('.').filter(|name| !name.is_empty()) {
                let section = place.entry(name).or_insert_with(|| Value::Table(Table::new()));
                let Value::Table(section) = section else {
                    let place = format!("{}: {name}", path.display());
                    return Err(ConfigError::Value { place, message: "expected a table".into() });
                };
                place = section;
            }
            match (place.get_mut(last), value) {
                (Some(Value::Table(old)), Some(Value::Table(new))) => old.extend(new),
                (_, Some(value)) => drop(place.insert(last.to_owned(), value)),
                (_, None) => drop(place.remove(last)),
            }
            flags.insert(key, flag);
        }
        Ok(Self { path, flags })
    }
}

/// A table whose keys are taken one after the other; what is left was not known.
pub(super) struct Section<'a> {
    pub(super) origin: &'a Origin<'a>,
    pub(super) name: String,
    pub(super) table: Table,
}

impl<'a> Section<'a> {
    pub(super) fn key(&self, key: &str) -> String {
        if self.name.is_empty() { key.to_owned() } else { format!("{}.{key}", self.name) }
    }

    /// A value of the wrong kind.
    pub(super) fn wrong<T>(&self, key: &str, message: &str) -> Result<T, ConfigError> {
        let place = match self.origin.flags.get(self.key(key).as_str()) {
            Some(flag) => flag.clone(),
            None => format!("{}: {}", self.origin.path.display(), self.key(key)),
        };
        Err(ConfigError::Value { place, message: message.to_owned() })
    }

    /// A value that asks for what is not there; named where another value would do.
    pub(super) fn unsupported<T>(&self, key: &str, value: Option<&str>) -> Result<T, ConfigError> {
        let (name, equals, file) = match self.origin.flags.get(self.key(key).as_str()) {
            Some(flag) => (flag.clone(), "=", String::new()),
            None => (self.key(key), " = ", format!(" in {}", self.origin.path.display())),
        };
        let value = value.map(|value| format!("{equals}{value}")).unwrap_or_default();
        Err(ConfigError::Unsupported { place: format!("{name}{value}{file}") })
    }

    /// The value, unless absent.
    pub(super) fn take(&mut self, key: &str) -> Option<Value> {
        self.table.remove(key)
    }

    pub(super) fn section(&mut self, key: &str) -> Result<Option<Section<'a>>, ConfigError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Table(table)) => {
                Ok(Some(Section { origin: self.origin, name: self.key(key), table }))
            }
            Some(_) => self.wrong(key, "expected a table"),
        }
    }

    pub(super) fn string(&mut self, key: &str) -> Result<Option<String>, ConfigError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => self.wrong(key, "expected a string"),
        }
    }

    pub(super) fn boolean(&mut self, key: &str) -> Result<Option<bool>, ConfigError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Boolean(flag)) => Ok(Some(flag)),
            Some(_) => self.wrong(key, "expected true or false"),
        }
    }

    pub(super) fn number<T: TryFrom<i64>>(&mut self, key: &str) -> Result<Option<T>, ConfigError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Integer(number)) => match T::try_from(number) {
                Ok(number) => Ok(Some(number)),
                Err(_) => self.wrong(key, "number out of range"),
            },
            Some(_) => self.wrong(key, "expected a number"),
        }
    }

    pub(super) fn strings(&mut self, key: &str) -> Result<Vec<String>, ConfigError> {
        let Some(value) = self.take(key) else { return Ok(Vec::new()) };
        let Value::Array(items) = value else { return self.wrong(key, "expected a list of strings") };
        items
            .into_iter()
            .map(|item| match item {
                Value::String(text) => Ok(text),
                _ => self.wrong(key, "expected a list of strings"),
            })
            .collect()
    }

    pub(super) fn space(&mut self, key: &str) -> Result<Option<DiskSpace>, ConfigError> {
        let space = match self.take(key) {
            None => return Ok(None),
            Some(Value::Integer(bytes)) if bytes >= 0 => Some(DiskSpace::Bytes(bytes)),
            Some(Value::String(text)) => DiskSpace::parse(&text),
            Some(_) => None,
        };
        match space {
            Some(space) => Ok(Some(space)),
            None => self.wrong(key, "expected bytes, or a text such as 512MB or 10%"),
        }
    }

    /// A number counts as seconds.
    pub(super) fn duration(&mut self, key: &str) -> Result<Option<Duration>, ConfigError> {
        let duration = match self.take(key) {
            None => return Ok(None),
            Some(Value::Integer(seconds)) => u64::try_from(seconds).ok().map(Duration::from_secs),
            Some(Value::String(text)) => {
                text.parse().ok().map(Duration::from_secs).or_else(|| parse_duration(&text))
            }
            Some(_) => None,
        };
        match duration {
            Some(duration) => Ok(Some(duration)),
            None => self.wrong(key, "expected seconds, or a text such as 48h"),
        }
    }

    /// Refuses a key that is set to anything but a zero value.
    pub(super) fn refuse(&mut self, keys: &[&str]) -> Result<(), ConfigError> {
        for key in keys {
            let set = match self.take(key) {
                None => false,
                Some(Value::Boolean(flag)) => flag,
                Some(Value::String(text)) => !text.is_empty(),
                Some(Value::Integer(number)) => number != 0,
                Some(Value::Array(items)) => !items.is_empty(),
                Some(Value::Table(table)) => !table.is_empty(),
                Some(_) => true,
            };
            if set {
                return self.unsupported(key, None);
            }
        }
        Ok(())
    }

    /// Takes keys that need no action here.
    pub(super) fn accept(&mut self, keys: &[&str]) {
        for key in keys {
            self.table.remove(*key);
        }
    }

    /// Reports what was not known.
    pub(super) fn finish(self, warnings: &mut Vec<String>) {
        let file = self.origin.path.display();
        warnings
            .extend(self.table.keys().map(|key| format!("{file}: unknown key {} is ignored", self.key(key))));
    }
}
