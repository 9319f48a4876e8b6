//! Build checks: which rules exist, which are switched off, and what they found.

use std::collections::BTreeSet;

use crate::error::{Fault, Lines, Result};
use crate::gofmt;

/// A finding that does not stop the build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LintWarning {
    /// Name of the rule, e.g. `StageNameCasing`.
    pub rule: &'static str,
    /// What was found, e.g. `Stage name 'Foo' should be lowercase`.
    pub message: String,
    /// What the rule is about.
    pub description: &'static str,
    /// Documentation of the rule; empty for those that have none.
    pub url: String,
    /// First and last line, from 1.
    pub lines: (u32, u32),
}

impl LintWarning {
    /// The short text of a progress warning: `Rule: message (line N)`.
    pub fn short(&self) -> String {
        format!("{}: {} (line {})", self.rule, self.message, self.lines.0)
    }
}

/// A build check.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rule {
    name: &'static str,
    description: &'static str,
    experimental: bool,
}

macro_rules! rules {
    ($($id:ident = $name:literal, $description:literal;)*) => {
        $(pub(crate) const $id: Rule = Rule { name: $name, description: $description, experimental: false };)*
    };
}

rules! {
    STAGE_NAME_CASING = "StageNameCasing", "Stage names should be lowercase";
    FROM_AS_CASING = "FromAsCasing", "The 'as' keyword should match the case of the 'from' keyword";
    NO_EMPTY_CONTINUATION = "NoEmptyContinuation", "Empty continuation lines will become errors in a future release";
    CONSISTENT_CASING = "ConsistentInstructionCasing",
        "All commands within the Dockerfile should use the same casing (either upper or lower)";
    DUPLICATE_STAGE = "DuplicateStageName", "Stage names should be unique";
    RESERVED_STAGE = "ReservedStageName", "Reserved words should not be used as stage names";
    JSON_ARGS = "JSONArgsRecommended",
        "JSON arguments recommended for ENTRYPOINT/CMD to prevent unintended behavior related to OS signals";
    MAINTAINER = "MaintainerDeprecated",
        "The MAINTAINER instruction is deprecated, use a label instead to define an image author";
    UNDEFINED_ARG_IN_FROM = "UndefinedArgInFrom", "FROM command must use declared ARGs";
    WORKDIR_RELATIVE = "WorkdirRelativePath",
        "Relative workdir without an absolute workdir declared within the build can have unexpected results if the base image changes";
    UNDEFINED_VAR = "UndefinedVar", "Variables should be defined before their use";
    MULTIPLE_INSTRUCTIONS = "MultipleInstructionsDisallowed",
        "Multiple instructions of the same type should not be used in the same stage";
    LEGACY_KEY_VALUE = "LegacyKeyValueFormat",
        "Legacy key/value format with whitespace separator should not be used";
    BASE_IMAGE_PLATFORM = "InvalidBaseImagePlatform", "Base image platform does not match expected target platform";
    REDUNDANT_PLATFORM = "RedundantTargetPlatform",
        "Setting platform to predefined $TARGETPLATFORM in FROM is redundant as this is the default behavior";
    SECRETS_IN_ENV = "SecretsUsedInArgOrEnv", "Sensitive data should not be used in the ARG or ENV commands";
    INVALID_DEFAULT_ARG = "InvalidDefaultArgInFrom",
        "Default value for global ARG results in an empty or invalid base image name";
    CONST_PLATFORM = "FromPlatformFlagConstDisallowed", "FROM --platform flag should not use a constant value";
    COPY_IGNORED = "CopyIgnoredFile", "Attempting to Copy file that is excluded by .dockerignore";
    EXPOSE_PROTO_CASING = "ExposeProtoCasing", "Protocol in EXPOSE instruction should be lowercase";
    EXPOSE_FORMAT = "ExposeInvalidFormat",
        "IP address and host-port mapping should not be used in EXPOSE instruction. This will become an error in a future release";
}

pub(crate) const DEFINITION_DESCRIPTION: Rule = Rule {
    name: "InvalidDefinitionDescription",
    description: "Comment for build stage or argument should follow the format: `# <arg/stage name> <description>`. If this is not intended to be a description comment, add an empty line or comment between the instruction and the comment.",
    experimental: true,
};

impl Rule {
    fn url(&self) -> String {
        if self.name == BASE_IMAGE_PLATFORM.name {
            return String::new();
        }
        let mut kebab = String::new();
        let name = self.name.replace("JSONArgs", "JsonArgs");
        for c in name.chars() {
            if c.is_uppercase() && !kebab.is_empty() {
                kebab.push('-');
            }
            kebab.extend(c.to_lowercase());
        }
        format!("https://docs.docker.com/go/dockerfile/rule/{kebab}/")
    }
}

/// Collects findings according to a `check` directive.
#[derive(Debug, Default)]
pub(crate) struct Linter {
    skip_all: bool,
    skip: BTreeSet<String>,
    experimental_all: bool,
    experimental: BTreeSet<String>,
    error: bool,
    pub(crate) warnings: Vec<LintWarning>,
}

impl Linter {
    /// `config` is e.g. `skip=RuleA,RuleB;error=true`.
    pub(crate) fn new(config: &str) -> Result<Self> {
        let mut linter = Self::default();
        for part in config.split(';').map(str::trim).filter(|p| !p.is_empty()) {
            let Some((key, value)) = part.split_once('=') else {
                return Err(Fault::new(format!("invalid check option {}", gofmt::quote(part))));
            };
            let rules = || value.split(',').map(|r| r.trim().to_string());
            match key.trim() {
                "skip" if value.trim() == "all" => linter.skip_all = true,
                "skip" => linter.skip.extend(rules()),
                "experimental" if value.trim() == "all" => linter.experimental_all = true,
                "experimental" => linter.experimental.extend(rules()),
                "error" => {
                    linter.error = gofmt::parse_bool(value.trim()).ok_or_else(|| {
                        Fault::new(format!("failed to parse check option {}", gofmt::quote(part)))
                    })?;
                }
                key => return Err(Fault::new(format!("invalid check option {}", gofmt::quote(key)))),
            }
        }
        Ok(linter)
    }

    pub(crate) fn warn(&mut self, rule: Rule, lines: Lines, message: impl Into<String>) {
        let on = if rule.experimental {
            self.experimental_all || self.experimental.contains(rule.name)
        } else {
            !self.skip_all && !self.skip.contains(rule.name)
        };
        if !on {
            return;
        }
        let warning = LintWarning {
            rule: rule.name,
            message: message.into(),
            description: rule.description,
            url: rule.url(),
            lines: (lines.start, lines.end),
        };
        if !self.warnings.contains(&warning) {
            self.warnings.push(warning);
        }
    }

    /// Fails if `error=true` was asked for and something was found.
    pub(crate) fn finish(&self) -> Result<()> {
        if !self.error || self.warnings.is_empty() {
            return Ok(());
        }
        let rules: BTreeSet<&str> = self.warnings.iter().map(|w| w.rule).collect();
        let rules: Vec<&str> = rules.into_iter().collect();
        Err(Fault::new(format!("lint violation found for rules: {}", rules.join(", "))))
    }
}
