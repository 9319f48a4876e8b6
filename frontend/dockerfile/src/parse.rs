//! Logical lines understood as instructions. No variables are expanded here and no stage is known.

use kiln_proto::pb;

use crate::error::{Fault, Result};
use crate::flags::{Flags, Takes};
use crate::gofmt;
use crate::instruction::{ArgDef, CommandLine, Copy, From, Health, Instruction, KeyValue, Kind, Run};
use crate::mount;
use crate::source::{Line, parse_heredoc};
use crate::suggest::with_suggestion;

const NAMES: &[&str] = &[
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "MAINTAINER",
    "ONBUILD",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];

/// Understands one line. `escape` is the file's escape character.
pub(crate) fn parse(line: &Line, escape: char) -> Result<Instruction> {
    let kind = parse_kind(line, escape).map_err(|f| f.within(line.lines).at(line.start))?;
    Ok(Instruction {
        kind,
        keyword: line.keyword.clone(),
        text: line.text.clone(),
        lines: line.lines,
        start: line.start,
        comments: line.comments.clone(),
    })
}

fn parse_kind(line: &Line, escape: char) -> Result<Kind> {
    let at_args = |f: Fault| f.at(line.args_at);
    match line.keyword.to_ascii_uppercase().as_str() {
        "ADD" => copy(line, true).map(Kind::Add),
        "ARG" => {
            no_flags(line)?;
            args(line, escape).map(Kind::Arg).map_err(at_args)
        }
        "CMD" => {
            no_flags(line)?;
            command_line(&line.args).map(Kind::Cmd).map_err(at_args)
        }
        "COPY" => copy(line, false).map(Kind::Copy),
        "ENTRYPOINT" => {
            no_flags(line)?;
            command_line(&line.args).map(Kind::Entrypoint).map_err(at_args)
        }
        "ENV" => {
            no_flags(line)?;
            key_values(line, "ENV", escape).map(Kind::Env).map_err(at_args)
        }
        "EXPOSE" => {
            no_flags(line)?;
            let mut ports = at_least_one(words(&line.args), "EXPOSE")?;
            ports.sort();
            Ok(Kind::Expose(ports))
        }
        "FROM" => from(line).map(Kind::From),
        "HEALTHCHECK" => health(line).map(Kind::Healthcheck),
        "LABEL" => {
            no_flags(line)?;
            key_values(line, "LABEL", escape).map(Kind::Label).map_err(at_args)
        }
        "MAINTAINER" => exactly_one(line, "MAINTAINER").map(Kind::Maintainer),
        "ONBUILD" => onbuild(line).map(Kind::Onbuild),
        "RUN" => run(line).map(Kind::Run),
        "SHELL" => {
            no_flags(line)?;
            let command = command_line(&line.args).map_err(at_args)?;
            match command {
                CommandLine { args, .. } if args.is_empty() => {
                    Err("SHELL requires at least one argument".into())
                }
                CommandLine { shell: true, .. } => Err(at_args(Fault::new(format!(
                    "SHELL requires the arguments to be in JSON form: {}",
                    line.text
                )))),
                CommandLine { args, .. } => Ok(Kind::Shell(args)),
            }
        }
        "STOPSIGNAL" => exactly_one(line, "STOPSIGNAL").map(Kind::StopSignal),
        "USER" => exactly_one(line, "USER").map(Kind::User),
        "VOLUME" => {
            no_flags(line)?;
            let volumes = list_or_words(&line.args).map_err(at_args)?;
            let volumes: Vec<String> = volumes.iter().map(|v| v.trim().to_string()).collect();
            if volumes.iter().any(String::is_empty) {
                return Err(at_args("VOLUME specified can not be an empty string".into()));
            }
            at_least_one(volumes, "VOLUME").map(Kind::Volume)
        }
        "WORKDIR" => exactly_one(line, "WORKDIR").map(Kind::Workdir),
        _ => {
            let message = format!("unknown instruction: {}", line.keyword);
            Err(with_suggestion(message, &line.keyword, NAMES, false).into())
        }
    }
}

fn no_flags(line: &Line) -> Result<()> {
    Flags::parse(&line.flags, &[]).map(|_| ())
}

fn exactly_one(line: &Line, name: &str) -> Result<String> {
    no_flags(line)?;
    if line.args.is_empty() {
        return Err(Fault::new(format!("{name} requires exactly one argument")));
    }
    Ok(line.args.clone())
}

fn at_least_one<T>(items: Vec<T>, name: &str) -> Result<Vec<T>> {
    if items.is_empty() {
        Err(Fault::new(format!("{name} requires at least one argument")))
    } else {
        Ok(items)
    }
}

fn words(text: &str) -> Vec<String> {
    text.split(['\t', '\x0b', '\x0c', '\r', ' ']).filter(|w| !w.is_empty()).map(str::to_string).collect()
}

/// A JSON array of strings; `None` if the text is something else.
fn json_list(text: &str) -> Result<Option<Vec<String>>> {
    if !text.trim_start().starts_with('[') {
        return Ok(None);
    }
    let Ok(items) = serde_json::from_str::<Vec<serde_json::Value>>(text) else { return Ok(None) };
    items
        .into_iter()
        .map(|item| match item {
            serde_json::Value::String(s) => Ok(s),
            _ => Err(Fault::new("when using JSON array syntax, arrays must be comprised of strings only")),
        })
        .collect::<Result<_>>()
        .map(Some)
}

fn list_or_words(text: &str) -> Result<Vec<String>> {
    Ok(json_list(text)?.unwrap_or_else(|| words(text)))
}

fn command_line(text: &str) -> Result<CommandLine> {
    Ok(match json_list(text)? {
        Some(args) => CommandLine { args, shell: false },
        None if text.is_empty() => CommandLine { args: Vec::new(), shell: true },
        None => CommandLine { args: vec![text.to_string()], shell: true },
    })
}

/// Words in which quotes and escapes are kept for the later expansion.
fn quoted_words(text: &str, escape: char) -> Vec<String> {
    let mut out = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if quote.is_none() && c.is_whitespace() {
            out.extend(word.take());
            continue;
        }
        let word = word.get_or_insert_default();
        if c == escape && quote != Some('\'') {
            // At the very end it escapes nothing.
            if let Some(next) = chars.next() {
                word.push(c);
                word.push(next);
            }
            continue;
        }
        match quote {
            Some(q) if q == c => quote = None,
            None if matches!(c, '\'' | '"') => quote = Some(c),
            _ => {}
        }
        word.push(c);
    }
    out.extend(word);
    out
}

fn key_values(line: &Line, name: &str, escape: char) -> Result<Vec<KeyValue>> {
    let words = at_least_one(quoted_words(&line.args, escape), name)?;
    if !words[0].contains('=') {
        let blank = |c: char| matches!(c, '\t' | '\x0b' | '\x0c' | '\r' | ' ');
        let Some((key, value)) = line.args.split_once(blank) else {
            return Err(Fault::new(format!("{name} must have two arguments")));
        };
        let value = value.trim_start_matches(blank).to_string();
        return Ok(vec![KeyValue { key: key.to_string(), value, legacy: true }]);
    }
    words
        .iter()
        .map(|word| match word.split_once('=') {
            Some(("", _)) => Err(Fault::new(format!("{name} names can not be blank"))),
            Some((key, value)) => Ok(KeyValue { key: key.into(), value: value.into(), legacy: false }),
            None => Err(Fault::new(format!(
                "Syntax error - can't find = in {}. Must be of the form: name=value",
                gofmt::quote(word)
            ))),
        })
        .collect()
}

fn args(line: &Line, escape: char) -> Result<Vec<ArgDef>> {
    at_least_one(quoted_words(&line.args, escape), "ARG")?
        .into_iter()
        .map(|word| match word.split_once('=') {
            Some(("", _)) => Err(Fault::new("ARG names can not be blank")),
            Some((key, value)) => Ok(ArgDef { key: key.into(), value: Some(value.into()) }),
            None => Ok(ArgDef { key: word, value: None }),
        })
        .collect()
}

fn from(line: &Line) -> Result<From> {
    let flags = Flags::parse(&line.flags, &[("platform", Takes::Text)])?;
    let words = words(&line.args);
    let (base, keyword_as, written) = match words.as_slice() {
        [base] => (base, "", ""),
        [base, as_, name] if as_.eq_ignore_ascii_case("as") => (base, as_.as_str(), name.as_str()),
        _ => return Err(Fault::new("FROM requires either one or three arguments").at(line.args_at)),
    };
    let name = written.to_lowercase();
    let valid = |n: &str| {
        n.starts_with(|c: char| c.is_ascii_lowercase())
            && n.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_.".contains(c))
    };
    if !name.is_empty() && !valid(&name) {
        let quoted = gofmt::quote(written);
        let message = format!(
            "invalid name for build stage: {quoted}, name can't start with a number or contain symbols"
        );
        return Err(Fault::new(message).at(line.args_at));
    }
    Ok(From {
        base: base.clone(),
        name,
        written_name: written.to_string(),
        keyword_as: keyword_as.to_string(),
        platform: flags.text("platform"),
    })
}

fn onbuild(line: &Line) -> Result<String> {
    no_flags(line)?;
    let trigger = line.args.split_whitespace().next().unwrap_or_default().to_ascii_uppercase();
    match trigger.as_str() {
        "" => return Err("ONBUILD requires at least one argument".into()),
        "ONBUILD" => return Err("Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed".into()),
        "MAINTAINER" | "FROM" => {
            return Err(Fault::new(format!("{trigger} isn't allowed as an ONBUILD trigger")));
        }
        _ if !NAMES.contains(&trigger.as_str()) => {
            let message = format!("unknown instruction: {trigger}");
            let message = with_suggestion(message, &trigger, NAMES, false);
            return Err(Fault::new(message).at(line.args_at));
        }
        _ => {}
    }
    let mut out = line.args.clone();
    for doc in &line.heredocs {
        out.push('\n');
        out.push_str(&doc.content);
        out.push_str(&doc.name);
    }
    Ok(out)
}

fn run(line: &Line) -> Result<Run> {
    let known = [
        ("mount", Takes::List),
        ("network", Takes::Text),
        ("security", Takes::Text),
        ("device", Takes::List),
    ];
    let flags = Flags::parse(&line.flags, &known)?;
    let network = match flags.text("network").as_str() {
        "" => None,
        "default" => Some(pb::NetMode::Unset),
        "none" => Some(pb::NetMode::None),
        "host" => Some(pb::NetMode::Host),
        other => {
            let message = format!("network mode {} is not supported", gofmt::quote(other));
            return Err(with_suggestion(message, other, ["default", "none", "host"], true).into());
        }
    };
    let security = match flags.text("security").as_str() {
        "" | "sandbox" => pb::SecurityMode::Sandbox,
        "insecure" => pb::SecurityMode::Insecure,
        other => {
            let message = format!("security mode {} is not supported", gofmt::quote(other));
            return Err(with_suggestion(message, other, ["sandbox", "insecure"], true).into());
        }
    };
    let mounts = flags.list("mount").into_iter().map(|m| mount::source_stage(&m).map(|from| (m, from)));
    Ok(Run {
        command: command_line(&line.args).map_err(|f| f.at(line.args_at))?,
        files: line.heredocs.clone(),
        mounts: mounts.collect::<Result<_>>()?,
        network,
        security,
        devices: flags.list("device").iter().map(|d| device(d)).collect::<Result<_>>()?,
    })
}

fn device(text: &str) -> Result<pb::CdiDevice> {
    let mut device = pb::CdiDevice { name: String::new(), optional: true };
    for field in gofmt::csv_fields(text)? {
        match field.split_once('=') {
            None if field == "required" => device.optional = false,
            None if device.name.is_empty() => device.name = field,
            Some(("name", name)) if device.name.is_empty() => device.name = name.to_string(),
            Some(("required", value)) => {
                device.optional = !gofmt::parse_bool(value)
                    .ok_or_else(|| Fault::new(format!("invalid value for required: {value}")))?;
            }
            _ => return Err(Fault::new(format!("unexpected field '{field}' in device"))),
        }
    }
    if device.name.is_empty() { Err("device requires a name".into()) } else { Ok(device) }
}

fn copy(line: &Line, add: bool) -> Result<Copy> {
    let name = if add { "ADD" } else { "COPY" };
    let common =
        [("chown", Takes::Text), ("chmod", Takes::Text), ("link", Takes::Bool), ("exclude", Takes::List)];
    let own: &[(&str, Takes)] = if add {
        &[("keep-git-dir", Takes::Bool), ("checksum", Takes::Text), ("unpack", Takes::Bool)]
    } else {
        &[("from", Takes::Text), ("parents", Takes::Bool)]
    };
    let flags = Flags::parse(&line.flags, &[&common, own].concat())?;
    let mut words = list_or_words(&line.args).map_err(|f| f.at(line.args_at))?;
    let (Some(dest), false) = (words.pop(), words.is_empty()) else {
        let message = format!(
            "{name} requires at least two arguments, but only one was provided. Destination could not be determined"
        );
        return Err(Fault::new(message).at(line.args_at));
    };
    if parse_heredoc(&dest).ok().flatten().is_some() {
        return Err(Fault::new(format!("{name} cannot accept a heredoc as a destination")).at(line.args_at));
    }
    let mut out = Copy {
        dest,
        from: flags.text("from"),
        chown: flags.text("chown"),
        chmod: flags.text("chmod"),
        link: flags.is_set("link"),
        parents: flags.is_set("parents"),
        exclude: flags.list("exclude"),
        keep_git_dir: flags.bool("keep-git-dir"),
        checksum: flags.text("checksum"),
        unpack: flags.bool("unpack"),
        ..Copy::default()
    };
    for word in words {
        let doc = parse_heredoc(&word).ok().flatten();
        match doc.and_then(|doc| line.heredocs.iter().rfind(|h| h.name == doc.name)) {
            Some(doc) => out.files.push(doc.clone()),
            None => out.sources.push(word),
        }
    }
    Ok(out)
}

fn health(line: &Line) -> Result<Health> {
    let (kind, rest) = match line.args.split_once(char::is_whitespace) {
        Some((kind, rest)) => (kind, rest.trim_start()),
        None => (line.args.as_str(), ""),
    };
    let times = ["interval", "timeout", "start-period", "start-interval"];
    match kind.to_ascii_uppercase().as_str() {
        "" => Err("HEALTHCHECK requires at least one argument".into()),
        "NONE" if !rest.is_empty() => Err(Fault::new("HEALTHCHECK NONE takes no arguments").at(line.args_at)),
        "NONE" => Ok(Health { test: vec!["NONE".into()], ..Health::default() }),
        "CMD" => {
            let known: Vec<_> = times.iter().chain(&["retries"]).map(|n| (*n, Takes::Text)).collect();
            let flags = Flags::parse(&line.flags, &known)?;
            let command = command_line(rest).map_err(|f| f.at(line.args_at))?;
            if command.args.is_empty() {
                return Err("Missing command after HEALTHCHECK CMD".into());
            }
            let kind = if command.shell { "CMD-SHELL" } else { "CMD" };
            let mut parsed = [0; 4];
            for (slot, name) in parsed.iter_mut().zip(times) {
                *slot = interval(name, &flags.text(name))?;
            }
            let retries = match flags.text("retries").as_str() {
                "" => 0,
                text => match text.parse::<i32>() {
                    Ok(n) if n < 0 => return Err(Fault::new(format!("--retries cannot be negative ({n})"))),
                    Ok(n) => i64::from(n),
                    Err(_) => return Err(Fault::new(format!("invalid value for --retries: {text}"))),
                },
            };
            let [interval, timeout, start_period, start_interval] = parsed;
            Ok(Health {
                test: std::iter::once(kind.to_string()).chain(command.args).collect(),
                interval,
                timeout,
                start_period,
                start_interval,
                retries,
            })
        }
        other => {
            let message = format!("Unknown type {} in HEALTHCHECK (try CMD)", gofmt::quote(other));
            Err(Fault::new(message).at(line.args_at))
        }
    }
}

fn interval(name: &str, text: &str) -> Result<i64> {
    if text.is_empty() {
        return Ok(0);
    }
    let nanos = gofmt::parse_duration(text)?;
    if nanos != 0 && nanos < 1_000_000 {
        return Err(Fault::new(format!("Interval {} cannot be less than 1ms", gofmt::quote(name))));
    }
    Ok(nanos)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Pos;
    use crate::source;

    fn one(text: &str) -> Result<Kind> {
        let source = source::read(text.as_bytes())?;
        parse(&source.lines[0], source.escape).map(|i| i.kind)
    }

    #[test]
    fn mistakes_have_a_place_and_a_hint() {
        for (text, want, column) in [
            ("  RUNN x", "unknown instruction: RUNN (did you mean RUN?)", 3),
            ("form x", "unknown instruction: form (did you mean from?)", 1),
            ("FROM --platfrom=x a", "unknown flag: --platfrom (did you mean platform?)", 6),
            ("COPY --form=a b c", "unknown flag: --form (did you mean from?)", 6),
            ("COPY --link=maybe b c", "expecting boolean value for flag --link, not: maybe", 6),
            ("COPY --chown=a --chown=b c d", "duplicate flag specified: --chown", 16),
            ("COPY --chown a b", "missing a value on flag: --chown", 6),
            (
                "COPY a",
                "COPY requires at least two arguments, but only one was provided. Destination could not be determined",
                6,
            ),
            ("FROM a b", "FROM requires either one or three arguments", 6),
            (
                "FROM a AS 1b",
                "invalid name for build stage: \"1b\", name can't start with a number or contain symbols",
                6,
            ),
            ("ENV a", "ENV must have two arguments", 5),
            ("ENV", "ENV requires at least one argument", 1),
            ("ENV a=b c", "Syntax error - can't find = in \"c\". Must be of the form: name=value", 5),
            ("ENV =b", "ENV names can not be blank", 5),
            ("CMD [\"a\", 1]", "when using JSON array syntax, arrays must be comprised of strings only", 5),
            ("SHELL sh", "SHELL requires the arguments to be in JSON form: SHELL sh", 7),
            ("HEALTHCHECK FOO", "Unknown type \"FOO\" in HEALTHCHECK (try CMD)", 13),
            ("HEALTHCHECK CMD", "Missing command after HEALTHCHECK CMD", 1),
            ("HEALTHCHECK --interval=1us CMD x", "Interval \"interval\" cannot be less than 1ms", 1),
            ("ONBUILD FROM x", "FROM isn't allowed as an ONBUILD trigger", 1),
            ("ONBUILD RUM x", "unknown instruction: RUM (did you mean RUN?)", 9),
            ("RUN --network=hots x", "network mode \"hots\" is not supported (did you mean host?)", 1),
            ("WORKDIR", "WORKDIR requires exactly one argument", 1),
        ] {
            let f = one(text).err().unwrap_or_else(|| panic!("{text}: no error"));
            assert_eq!(f.message, want);
            assert_eq!(f.at, Some(Pos { line: 1, column }), "{text}");
        }
    }

    #[test]
    fn command_forms() {
        let Ok(Kind::Cmd(c)) = one("CMD [\"a\", \"b c\"]") else { panic!("cmd") };
        assert_eq!((c.args, c.shell), (vec!["a".to_string(), "b c".into()], false));
        let Ok(Kind::Cmd(c)) = one("CMD ['a']") else { panic!("cmd") };
        assert_eq!((c.args, c.shell), (vec!["['a']".to_string()], true));
        let Ok(Kind::Env(e)) = one("ENV a=\"b c\" d=e\\ f g='h i'") else { panic!("env") };
        assert_eq!(e.iter().map(|kv| kv.value.as_str()).collect::<Vec<_>>(), ["\"b c\"", "e\\ f", "'h i'"]);
        let Ok(Kind::Env(e)) = one("ENV a   b  c") else { panic!("env") };
        assert_eq!((e[0].value.as_str(), e[0].legacy), ("b  c", true));
        let Ok(Kind::Arg(a)) = one("ARG a b= c=\"x y\"") else { panic!("arg") };
        assert_eq!(
            a.iter().map(|d| d.value.as_deref()).collect::<Vec<_>>(),
            [None, Some(""), Some("\"x y\"")]
        );
        let Ok(Kind::Copy(c)) = one("COPY --from=x --exclude=a --exclude=b [\"a b\", \"/c/\"]") else {
            panic!("copy")
        };
        assert_eq!((c.sources, c.dest.as_str(), c.exclude.len()), (vec!["a b".to_string()], "/c/", 2));
        let Ok(Kind::Copy(c)) = one("COPY <<a x /d/\nhi\na\n") else { panic!("copy") };
        assert_eq!((c.files.len(), c.sources), (1, vec!["x".to_string()]));
    }
}
