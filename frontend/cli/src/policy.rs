//! Source policies as files: JSON with the names of the wire format, in which enumerations are names or numbers.

use std::collections::HashMap;
use std::path::Path;

use kiln_proto::policy as wire;
use serde::Deserialize;

use crate::error::CliError;

/// Reads a policy.
pub(crate) fn read(path: &Path) -> Result<wire::Policy, CliError> {
    let text = std::fs::read(path).map_err(|error| CliError::file("read source policy", path, error))?;
    let policy: Policy = serde_json::from_slice(&text)
        .map_err(|error| CliError::usage(format!("source policy {}: {error}", path.display())))?;
    Ok(wire::Policy {
        version: policy.version,
        rules: policy
            .rules
            .into_iter()
            .map(Rule::wire)
            .collect::<Result<_, _>>()
            .map_err(|text| CliError::usage(format!("source policy {}: {text}", path.display())))?,
    })
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Policy {
    version: i64,
    rules: Vec<Rule>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Rule {
    action: Named,
    selector: Option<Selector>,
    updates: Option<Update>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Selector {
    identifier: String,
    #[serde(alias = "matchType")]
    match_type: Named,
    constraints: Vec<Constraint>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Constraint {
    key: String,
    value: String,
    condition: Named,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Update {
    identifier: String,
    attrs: HashMap<String, String>,
}

/// A value of an enumeration.
#[derive(Deserialize)]
#[serde(untagged)]
enum Named {
    Number(i32),
    Name(String),
}

impl Default for Named {
    fn default() -> Self {
        Self::Number(0)
    }
}

impl Named {
    fn value<T: TryFrom<i32> + Into<i32>>(self, from_name: fn(&str) -> Option<T>) -> Result<i32, String> {
        let (found, text) = match self {
            Self::Number(number) => (T::try_from(number).ok(), number.to_string()),
            Self::Name(name) => (from_name(&name), name),
        };
        found.map(Into::into).ok_or_else(|| format!("unknown value {text:?}"))
    }
}

impl Rule {
    fn wire(self) -> Result<wire::Rule, String> {
        let selector = |selector: Selector| {
            let constraint = |constraint: Constraint| {
                Ok(wire::AttrConstraint {
                    key: constraint.key,
                    value: constraint.value,
                    condition: constraint.condition.value(wire::AttrMatch::from_str_name)?,
                })
            };
            Ok::<_, String>(wire::Selector {
                identifier: selector.identifier,
                match_type: selector.match_type.value(wire::MatchType::from_str_name)?,
                constraints: selector
                    .constraints
                    .into_iter()
                    .map(constraint)
                    .collect::<Result<_, String>>()?,
            })
        };
        Ok(wire::Rule {
            action: self.action.value(wire::PolicyAction::from_str_name)?,
            selector: self.selector.map(selector).transpose()?,
            updates: self
                .updates
                .map(|update| wire::Update { identifier: update.identifier, attrs: update.attrs }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("policy.json");
        let text = r#"{"version": 1, "rules": [
            {"action": "CONVERT", "selector": {"identifier": "docker-image://a*", "match_type": "WILDCARD",
              "constraints": [{"key": "k", "value": "v", "condition": 1}]},
             "updates": {"identifier": "docker-image://b", "attrs": {"x": "y"}}},
            {"action": "DENY", "selector": {"identifier": "docker-image://c", "matchType": "EXACT"}}]}"#;
        std::fs::write(&path, text).unwrap();
        let policy = read(&path).unwrap();
        let [convert, deny] = &policy.rules[..] else { panic!("two rules") };
        assert_eq!(convert.action(), wire::PolicyAction::Convert);
        let selector = convert.selector.as_ref().unwrap();
        assert_eq!(selector.constraints[0].condition(), wire::AttrMatch::Notequal);
        assert_eq!(convert.updates.as_ref().unwrap().attrs["x"], "y");
        assert_eq!(deny.action(), wire::PolicyAction::Deny);
        assert_eq!(deny.selector.as_ref().unwrap().match_type(), wire::MatchType::Exact);
        for wrong in
            [r#"{"rules": [{"action": "SHOUT"}]}"#, r#"{"rules": 1}"#, "", r#"{"rules": [{"action": 9}]}"#]
        {
            std::fs::write(&path, wrong).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("policy.json"), "{wrong}: {error}");
        }
    }
}
