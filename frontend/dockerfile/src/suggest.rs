//! "Did you mean": the nearest known word.

/// Words further away than this are no help.
const MAX_DISTANCE: usize = 2;

/// The option nearest to `word`. Nothing if `word` itself is an option: then it is not a typo.
/// Without `case_sensitive` the answer is written in the case of `word`.
pub(crate) fn nearest<S: AsRef<str>>(
    word: &str,
    options: impl IntoIterator<Item = S>,
    case_sensitive: bool,
) -> Option<String> {
    let fold = |s: &str| if case_sensitive { s.to_string() } else { s.to_lowercase() };
    let wanted = fold(word);
    let mut best: Option<(usize, String)> = None;
    for option in options {
        let option = fold(option.as_ref());
        if option == wanted {
            return None;
        }
        let distance = distance(&wanted, &option);
        if distance <= MAX_DISTANCE && best.as_ref().is_none_or(|(d, _)| distance < *d) {
            best = Some((distance, option));
        }
    }
    let (_, found) = best?;
    Some(if !case_sensitive && word == word.to_uppercase() { found.to_uppercase() } else { found })
}

/// `message`, with ` (did you mean …?)` if there is something near.
pub(crate) fn with_suggestion<S: AsRef<str>>(
    message: String,
    word: &str,
    options: impl IntoIterator<Item = S>,
    case_sensitive: bool,
) -> String {
    match nearest(word, options, case_sensitive) {
        Some(found) => format!("{message} (did you mean {found}?)"),
        None => message,
    }
}

/// Number of insertions, deletions, replacements and swaps of neighbours between two words.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 0..a.len() {
        let mut row = vec![i + 1; b.len() + 1];
        for j in 0..b.len() {
            let replace = last[j] + usize::from(a[i] != b[j]);
            row[j + 1] = replace.min(row[j] + 1).min(last[j + 1] + 1);
            if i > 0 && j > 0 && (a[i], a[i - 1]) == (b[j - 1], b[j]) {
                row[j + 1] = row[j + 1].min(before[j - 1] + 1);
            }
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_wins_in_the_writers_case() {
        let words = ["RUN", "FROM", "ENTRYPOINT"];
        assert_eq!(nearest("RUNN", words, false).as_deref(), Some("RUN"));
        assert_eq!(nearest("form", words, false).as_deref(), Some("from"));
        assert_eq!(nearest("RNU", ["ENV", "RUN"], false).as_deref(), Some("RUN"));
        assert_eq!(nearest("ENTRIPONT", words, false).as_deref(), Some("ENTRYPOINT"));
        assert_eq!(nearest("xyz", words, false), None);
        assert_eq!(nearest("from", words, false), None);
        assert_eq!(nearest("kitten", ["sitting"], true), None);
        assert_eq!((distance("kitten", "sitting"), distance("", "abc")), (3, 3));
    }
}
