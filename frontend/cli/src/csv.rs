//! Comma-separated `key=value` lists of flags, quoted as CSV.

use crate::error::CliError;

/// The fields of one line; a field that starts with `"` ends at the next lone `"`, and `""` in it means `"`.
pub(crate) fn fields(line: &str) -> Result<Vec<String>, CliError> {
    let broken = || CliError::usage(format!("invalid value {line:?}: a quote is not closed"));
    let mut all = Vec::new();
    let mut rest = line;
    loop {
        let field;
        if let Some(mut quoted) = rest.strip_prefix('"') {
            let mut text = String::new();
            loop {
                let end = quoted.find('"').ok_or_else(broken)?;
                text.push_str(&quoted[..end]);
                quoted = &quoted[end + 1..];
                match quoted.strip_prefix('"') {
                    Some(more) => {
                        text.push('"');
                        quoted = more;
                    }
                    None => break,
                }
            }
            field = text;
            rest = quoted;
            if !rest.is_empty() && !rest.starts_with(',') {
                return Err(broken());
            }
        } else {
            let end = rest.find(',').unwrap_or(rest.len());
            field = rest[..end].to_owned();
            rest = &rest[end..];
        }
        all.push(field);
        match rest.strip_prefix(',') {
            Some(more) => rest = more,
            None => return Ok(all),
        }
    }
}

/// The fields as pairs; keys are lower-cased, a field without `=` is refused.
pub(crate) fn pairs(line: &str) -> Result<Vec<(String, String)>, CliError> {
    fields(line)?
        .into_iter()
        .map(|field| match field.split_once('=') {
            Some((key, value)) => Ok((key.trim().to_ascii_lowercase(), value.to_owned())),
            None => Err(CliError::usage(format!("invalid value {line:?}: {field:?} is not key=value"))),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_protect_commas() {
        let expected = ["type=image", "name=a,b", "x=\"y\""];
        assert_eq!(fields(r#"type=image,"name=a,b","x=""y""""#).unwrap(), expected);
        assert_eq!(fields("").unwrap(), [""]);
        assert_eq!(fields("a,").unwrap(), ["a", ""]);
        for text in ["\"a", "\"a\"b,c", "a,\"b"] {
            assert!(fields(text).is_err(), "{text}");
        }
    }

    #[test]
    fn pairs_need_an_equals_sign() {
        assert_eq!(
            pairs("Type=oci,dest=a=b").unwrap(),
            [("type".into(), "oci".into()), ("dest".into(), "a=b".into())]
        );
        assert!(pairs("type=oci,dest").is_err());
    }
}
