//! Which records a client asks for: conditions on names, as everywhere, and on times. Owns what filters call a record's
//! fields.

use std::time::{Duration, SystemTime};

use kiln_cache::Filter;
use kiln_proto::control::BuildHistoryRecord;
use tonic::Code;

use super::time;
use crate::config::parse_duration;
use crate::error::BuildError;

/// A client's filters; one of them must hold.
pub(super) struct Filters(Vec<All>);

/// Conditions that must hold together.
struct All {
    times: Vec<TimeTest>,
    rest: Filter,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operator {
    AtLeast,
    AtMost,
    More,
    Less,
}

#[derive(Debug, Clone, Copy)]
enum TimeTest {
    /// In seconds.
    Started(Operator, u64),
    Completed(Operator, u64),
    Took(Operator, Duration),
}

impl Filters {
    /// Compiles filters; none match everything. Times are RFC 3339 or durations before now.
    ///
    /// # Errors
    /// `InvalidArgument`.
    pub(super) fn parse(filters: &[String]) -> Result<Self, BuildError> {
        filters.iter().map(|filter| All::parse(filter)).collect::<Result<_, _>>().map(Self)
    }

    pub(super) fn holds(&self, record: &BuildHistoryRecord) -> bool {
        let all = |all: &All| {
            all.times.iter().all(|test| test.holds(record)) && all.rest.holds(&|name| field(record, name))
        };
        self.0.is_empty() || self.0.iter().any(all)
    }
}

fn invalid(text: impl std::fmt::Display) -> BuildError {
    BuildError::new(Code::InvalidArgument, text.to_string())
}

impl All {
    fn parse(filter: &str) -> Result<Self, BuildError> {
        let (mut times, mut rest) = (Vec::new(), Vec::new());
        let fields = kiln_dockerfile::csv_fields(filter)
            .map_err(|error| invalid(format_args!("invalid filter {filter:?}: {error}")))?;
        for field in fields {
            match TimeTest::parse(&field)? {
                Some(test) => times.push(test),
                None => rest.push(field),
            }
        }
        let rest = match rest.is_empty() {
            true => Filter::default(),
            false => Filter::parse(&[rest.join(",")]).map_err(invalid)?,
        };
        Ok(Self { times, rest })
    }
}

impl Operator {
    fn holds<T: PartialOrd>(self, value: T, limit: T) -> bool {
        match self {
            Self::AtLeast => value >= limit,
            Self::AtMost => value <= limit,
            Self::More => value > limit,
            Self::Less => value < limit,
        }
    }
}

impl TimeTest {
    /// `None` if the condition is about something else.
    fn parse(text: &str) -> Result<Option<Self>, BuildError> {
        let Some(at) = text.find(['<', '>']) else { return Ok(None) };
        let (name, rest) = text.split_at(at);
        let operators = [
            (">=", Operator::AtLeast),
            ("<=", Operator::AtMost),
            (">", Operator::More),
            ("<", Operator::Less),
        ];
        let found = operators.iter().find_map(|(sign, operator)| Some((*operator, rest.strip_prefix(sign)?)));
        let Some((operator, value)) = found else { return Ok(None) };
        let moment = || {
            let before = parse_duration(value).and_then(|ago| SystemTime::now().checked_sub(ago));
            let given = || value.parse::<jiff::Timestamp>().ok().map(SystemTime::from);
            before.or_else(given).map(seconds).ok_or_else(|| invalid(format_args!("invalid time {value}")))
        };
        Ok(Some(match name {
            "startedAt" => Self::Started(operator, moment()?),
            "completedAt" => Self::Completed(operator, moment()?),
            "duration" => {
                let limit = parse_duration(value);
                Self::Took(operator, limit.ok_or_else(|| invalid(format_args!("invalid duration {value}")))?)
            }
            _ => return Ok(None),
        }))
    }

    /// A build that runs has neither an end nor a duration: both count as nothing.
    fn holds(self, record: &BuildHistoryRecord) -> bool {
        let (started, completed) = (time(&record.created_at), time(&record.completed_at));
        match self {
            Self::Started(operator, limit) => operator.holds(seconds(started), limit),
            Self::Completed(operator, limit) => operator.holds(seconds(completed), limit),
            Self::Took(operator, limit) => {
                operator.holds(completed.duration_since(started).unwrap_or_default(), limit)
            }
        }
    }
}

/// Since the epoch.
fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// How a build stands.
pub fn build_status(record: &BuildHistoryRecord) -> &'static str {
    match &record.error {
        _ if record.completed_at.is_none() => "Running",
        None => "Completed",
        Some(error) if error.code == Code::Cancelled as i32 => "Canceled",
        Some(_) => "Error",
    }
}

/// A field of a record by its name in filters.
fn field(record: &BuildHistoryRecord, name: &str) -> Option<String> {
    let attrs = &record.frontend_attrs;
    match name {
        "ref" => Some(record.r#ref.clone()),
        "status" => Some(build_status(record).to_ascii_lowercase()),
        "repository" => {
            let named = || attrs.get("context").and_then(|context| kiln_dockerfile::git_remote(context));
            attrs.get("vcs:source").cloned().or_else(named)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_proto::rpc::Status;

    /// Builds that began `ago` hours before now.
    fn records() -> Vec<BuildHistoryRecord> {
        let build = |name: &str, ago: u64, took: Option<u64>| {
            let started = SystemTime::now() - Duration::from_secs(ago * 3600);
            BuildHistoryRecord {
                r#ref: name.into(),
                created_at: Some(started.into()),
                completed_at: took.map(|seconds| (started + Duration::from_secs(seconds)).into()),
                ..BuildHistoryRecord::default()
            }
        };
        let mut failed = build("failed", 5, Some(600));
        failed.error = Some(Status { code: Code::Unknown as i32, ..Status::default() });
        failed.frontend_attrs.insert("context".into(), "https://example.com/a.git#main:dir".into());
        vec![build("old", 48, Some(60)), failed, build("running", 1, None)]
    }

    fn found(filters: &[&str]) -> Vec<String> {
        let filters: Vec<String> = filters.iter().map(|text| (*text).to_owned()).collect();
        let filters = Filters::parse(&filters).expect("valid");
        records().into_iter().filter(|record| filters.holds(record)).map(|record| record.r#ref).collect()
    }

    #[test]
    fn conditions_on_times_and_names() {
        assert_eq!(found(&[]), ["old", "failed", "running"]);
        assert_eq!(found(&["startedAt>24h"]), ["failed", "running"]);
        assert_eq!(found(&["startedAt<=24h"]), ["old"]);
        assert_eq!(found(&["completedAt>24h"]), ["failed"]);
        assert_eq!(found(&["startedAt>2001-02-03T04:05:06Z"]), ["old", "failed", "running"]);
        assert_eq!(found(&["duration>=10m"]), ["failed"]);
        assert_eq!(found(&["duration<2m"]), ["old", "running"]);
        assert_eq!(found(&["startedAt<2h,status==error"]), ["failed"]);
        assert_eq!(found(&["startedAt<24h", "ref==running"]), ["old", "running"]);
        assert_eq!(found(&["repository==https://example.com/a.git"]), ["failed"]);
        assert_eq!(found(&["status!=error,ref~=^o"]), ["old"]);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for filter in ["startedAt>yesterday", "duration<5", "ref+foo", "other>5m"] {
            assert!(Filters::parse(&[filter.to_owned()]).is_err(), "{filter}");
        }
    }
}
