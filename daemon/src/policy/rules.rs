//! Rules of a source policy: which sources are allowed, and what others are used instead.

use std::borrow::Cow;
use std::sync::Arc;

use kiln_proto::pb::SourceOp;
use kiln_proto::policy::{AttrMatch, MatchType, Policy, PolicyAction, Rule, Selector};
use regex::Regex;
use tonic::Code;

use crate::error::BuildError;

/// How often one source may be converted, against rules that go in circles.
const CONVERSIONS: usize = 20;

/// Lists of rules, in order. Each decides by itself what it denies.
#[derive(Debug, Default, Clone)]
pub(super) struct Rules(Vec<Arc<[Compiled]>>);

#[derive(Debug)]
struct Compiled {
    rule: Rule,
    selector: Selector,
    /// What else than the identifier itself is matched.
    pattern: Option<Regex>,
    /// For the constraints that are patterns, in their order.
    values: Vec<Regex>,
}

fn invalid(text: impl std::fmt::Display) -> BuildError {
    BuildError::new(Code::InvalidArgument, format!("invalid source policy: {text}"))
}

fn regex(text: &str) -> Result<Regex, BuildError> {
    Regex::new(text).map_err(|error| invalid(format_args!("regex {text:?}: {error}")))
}

/// `*` stands for anything.
fn wildcard(text: &str) -> Result<Regex, BuildError> {
    if text.contains("**") {
        return Err(invalid("invalid wildcard: \"**\""));
    }
    regex(&format!("^{}$", regex::escape(text).replace(r"\*", "(.*)")))
}

impl Compiled {
    fn new(rule: &Rule) -> Result<Self, BuildError> {
        let selector = rule.selector.clone().ok_or_else(|| invalid("invalid nil selector in policy"))?;
        let unknown = |what: &str, number: i32| invalid(format_args!("unknown {what} {number}"));
        PolicyAction::try_from(rule.action).map_err(|_| unknown("type of action", rule.action))?;
        let kind = MatchType::try_from(selector.match_type);
        let pattern = match kind.map_err(|_| unknown("match type", selector.match_type))? {
            MatchType::Exact => None,
            MatchType::Regex => Some(regex(&selector.identifier)?),
            MatchType::Wildcard => Some(wildcard(&selector.identifier)?),
        };
        let mut values = Vec::new();
        for constraint in &selector.constraints {
            let condition = AttrMatch::try_from(constraint.condition);
            if condition.map_err(|_| unknown("condition", constraint.condition))? == AttrMatch::Matches {
                values.push(regex(&constraint.value)?);
            }
        }
        Ok(Self { rule: rule.clone(), selector, pattern, values })
    }

    fn matches(&self, source: &SourceOp) -> bool {
        let mut values = self.values.iter();
        let constraints = self.selector.constraints.iter().all(|constraint| {
            let value = source.attrs.get(&constraint.key).map_or("", String::as_str);
            match constraint.condition() {
                AttrMatch::Equal => value == constraint.value,
                AttrMatch::Notequal => value != constraint.value,
                AttrMatch::Matches => values.next().is_some_and(|regex| regex.is_match(value)),
            }
        });
        let named = self.selector.identifier == source.identifier;
        constraints
            && (named || self.pattern.as_ref().is_some_and(|regex| regex.is_match(&source.identifier)))
    }

    /// Changes a source that matches; says whether it was another before.
    fn convert(&self, source: &mut SourceOp) -> Result<bool, BuildError> {
        let updates = self.rule.updates.as_ref();
        let updates = updates.ok_or_else(|| invalid("missing destination for convert rule"))?;
        let wanted = match updates.identifier.as_str() {
            "" => self.selector.identifier.as_str(),
            wanted => wanted,
        };
        let captures = self.pattern.as_ref().and_then(|regex| regex.captures(&source.identifier));
        let wanted: Cow<'_, str> = match captures {
            Some(captures) => {
                let mut text = String::new();
                captures.expand(wanted, &mut text);
                text.into()
            }
            None => wanted.into(),
        };
        let mut changed = false;
        if !wanted.is_empty() && *wanted != source.identifier {
            source.identifier = wanted.into_owned();
            changed = true;
        }
        for (key, value) in &updates.attrs {
            changed |= source.attrs.insert(key.clone(), value.clone()).as_ref() != Some(value);
        }
        Ok(changed)
    }
}

impl Rules {
    /// # Errors
    /// A rule makes no sense.
    pub(super) fn add(&mut self, policy: &Policy) -> Result<(), BuildError> {
        let list: Result<Vec<_>, _> = policy.rules.iter().map(Compiled::new).collect();
        self.0.push(list?.into());
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.iter().all(|list| list.is_empty())
    }

    /// Converts a source until no rule changes it any more.
    ///
    /// # Errors
    /// The last rule that matches denies it, or it is converted for ever.
    pub(super) fn evaluate(&self, source: &mut SourceOp) -> Result<(), BuildError> {
        for _ in 0..=CONVERSIONS {
            if !self.pass(source)? {
                return Ok(());
            }
        }
        Err(BuildError::build("too many mutations on a single source: too many operations"))
    }

    fn pass(&self, source: &mut SourceOp) -> Result<bool, BuildError> {
        for list in &self.0 {
            let mut denied = false;
            for rule in list.iter() {
                if !rule.matches(source) {
                    continue;
                }
                match rule.rule.action() {
                    PolicyAction::Allow => denied = false,
                    PolicyAction::Deny => denied = true,
                    PolicyAction::Convert => {
                        if rule.convert(source)? {
                            return Ok(true);
                        }
                    }
                }
            }
            if denied {
                let name = &source.identifier;
                return Err(BuildError::build(format!(
                    "source {name:?} denied by policy: source denied by policy"
                )));
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_proto::policy::{AttrConstraint, Update};

    fn rule(action: PolicyAction, kind: MatchType, identifier: &str, update: &str) -> Rule {
        Rule {
            action: action as i32,
            selector: Some(Selector {
                identifier: identifier.into(),
                match_type: kind as i32,
                constraints: Vec::new(),
            }),
            updates: Some(Update { identifier: update.into(), ..Update::default() }),
        }
    }

    fn evaluated(rules: &[Rule], identifier: &str) -> Result<String, String> {
        evaluated_by(&[rules], identifier)
    }

    fn evaluated_by(lists: &[&[Rule]], identifier: &str) -> Result<String, String> {
        let mut rules = Rules::default();
        for list in lists {
            let policy = Policy { version: 1, rules: list.to_vec() };
            rules.add(&policy).map_err(|error| error.message)?;
        }
        let mut source = SourceOp { identifier: identifier.into(), ..SourceOp::default() };
        rules.evaluate(&mut source).map_err(|error| error.message)?;
        Ok(source.identifier)
    }

    #[test]
    fn the_last_match_decides() {
        use MatchType::{Exact, Regex, Wildcard};
        use PolicyAction::{Allow, Convert, Deny};
        let deny_all = rule(Deny, Wildcard, "*", "");
        let allow = rule(Allow, Wildcard, "docker-image://*", "");
        let image = "docker-image://docker.io/library/a:1";
        assert!(
            evaluated(std::slice::from_ref(&deny_all), image)
                .expect_err("denied")
                .contains("denied by policy")
        );
        assert_eq!(evaluated(&[deny_all.clone(), allow.clone()], image).expect("allowed"), image);
        assert!(evaluated(&[allow.clone(), deny_all.clone()], image).is_err());
        assert!(evaluated_by(&[&[deny_all], &[allow]], image).is_err(), "another list allows nothing");
        assert!(evaluated(&[rule(Deny, Exact, "docker-image://*", "")], image).is_ok());

        let pin =
            rule(Convert, Regex, r"^docker-image://docker\.io/library/(\w+):1$", "docker-image://r/$1:2");
        assert_eq!(evaluated(&[pin], image).expect("converted"), "docker-image://r/a:2");
        let mirror = rule(Convert, Wildcard, "docker-image://docker.io/*", "docker-image://mirror/${1}");
        assert_eq!(evaluated(&[mirror], image).expect("converted"), "docker-image://mirror/library/a:1");
        let there = rule(Convert, Exact, image, "https://x/b");
        let back = rule(Convert, Exact, "https://x/b", image);
        assert!(evaluated(&[there, back], image).expect_err("circle").contains("too many mutations"));
        assert!(
            evaluated(&[rule(Deny, Regex, "(", "")], image)
                .expect_err("regex")
                .contains("invalid source policy")
        );
    }

    #[test]
    fn attributes_are_matched_and_set() {
        let mut deny = rule(PolicyAction::Convert, MatchType::Wildcard, "https://*", "");
        let constraint = |condition: AttrMatch, value: &str| AttrConstraint {
            key: "k".into(),
            value: value.into(),
            condition: condition as i32,
        };
        if let (Some(selector), Some(updates)) = (&mut deny.selector, &mut deny.updates) {
            selector.constraints =
                vec![constraint(AttrMatch::Matches, "^v"), constraint(AttrMatch::Notequal, "vv")];
            updates.identifier = "https://${1}".into();
            updates.attrs.insert("k".into(), "new".into());
        }
        let mut rules = Rules::default();
        rules.add(&Policy { version: 1, rules: vec![deny] }).expect("rules");
        for (before, after) in [("v1", "new"), ("vv", "vv"), ("x", "x")] {
            let attrs = [("k".to_owned(), before.to_owned())].into();
            let mut source = SourceOp { identifier: "https://a".into(), attrs };
            rules.evaluate(&mut source).expect("allowed");
            assert_eq!((source.identifier.as_str(), source.attrs["k"].as_str()), ("https://a", after));
        }
    }
}
