//! Which step of one build is which step of another: first by name, then by what it does, then by
//! where it stands. Linear in the size of the graphs.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

use super::graph::Graph;

/// For each vertex of `new`, its counterpart in `old`.
pub(super) fn pair(old: &Graph, new: &Graph) -> Vec<Option<usize>> {
    let mut pairing = Pairing { of_new: vec![None; new.len()], taken: vec![false; old.len()], old, new };
    pairing.in_order(|graph, at| Some((plain(graph.name(at)), graph.kind(at))));
    pairing.in_order(|graph, at| {
        let op = graph.op(at);
        (!op.is_empty()).then_some((stage(graph.name(at)), op))
    });
    pairing.upwards();
    pairing.downwards();
    // Sources that nothing known stands on.
    pairing
        .in_order(|graph, at| (graph.inputs(at).len() == 0).then(|| (stage(graph.name(at)), graph.kind(at))));
    pairing.upwards();
    pairing.of_new
}

struct Pairing<'a> {
    of_new: Vec<Option<usize>>,
    taken: Vec<bool>,
    old: &'a Graph,
    new: &'a Graph,
}

impl<'a> Pairing<'a> {
    fn join(&mut self, new: usize, old: usize) {
        self.of_new[new] = Some(old);
        self.taken[old] = true;
    }

    /// Pairs what has the same key: the first with the first, the second with the second.
    fn in_order<K: Hash + Eq>(&mut self, key: impl Fn(&'a Graph, usize) -> Option<K>) {
        let mut left: HashMap<K, VecDeque<usize>> = HashMap::new();
        for at in (0..self.old.len()).filter(|at| !self.taken[*at]) {
            if let Some(key) = key(self.old, at) {
                left.entry(key).or_default().push_back(at);
            }
        }
        for at in 0..self.new.len() {
            if self.of_new[at].is_none()
                && let Some(key) = key(self.new, at)
                && let Some(old) = left.get_mut(&key).and_then(VecDeque::pop_front)
            {
                self.join(at, old);
            }
        }
    }

    /// Pairs what does a like thing on paired inputs.
    fn upwards(&mut self) {
        let mut users: HashMap<(usize, &str, &str), VecDeque<usize>> = HashMap::new();
        for at in (0..self.old.len()).filter(|at| !self.taken[*at]) {
            let (kind, stage) = (self.old.kind(at), stage(self.old.name(at)));
            for input in self.old.inputs(at) {
                users.entry((input.vertex, kind, stage)).or_default().push_back(at);
            }
        }
        for at in 0..self.new.len() {
            if self.of_new[at].is_some() {
                continue;
            }
            let (kind, stage) = (self.new.kind(at), stage(self.new.name(at)));
            let found = self.new.inputs(at).find_map(|input| {
                let users = users.get_mut(&(self.of_new[input.vertex]?, kind, stage))?;
                while let Some(user) = users.pop_front() {
                    if !self.taken[user] {
                        return Some(user);
                    }
                }
                None
            });
            if let Some(old) = found {
                self.join(at, old);
            }
        }
    }

    /// Pairs inputs of paired consumers.
    fn downwards(&mut self) {
        for at in (0..self.new.len()).rev() {
            let Some(old) = self.of_new[at] else { continue };
            for (input, before) in self.new.inputs(at).zip(self.old.inputs(old)) {
                let (input, before) = (input.vertex, before.vertex);
                if self.of_new[input].is_none()
                    && !self.taken[before]
                    && self.new.kind(input) == self.old.kind(before)
                {
                    self.join(input, before);
                }
            }
        }
    }
}

/// The bracket at the start of a name, and what follows.
fn split(name: &str) -> Option<(&str, &str)> {
    name.strip_prefix('[')?.split_once("] ")
}

fn is_count(word: &str) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    word.split_once('/').is_some_and(|(at, of)| digits(at) && digits(of))
}

/// A name without its number among the steps of its stage: `[build 2/5] RUN x` is `[build] RUN x`.
pub(super) fn plain(name: &str) -> Cow<'_, str> {
    match split(name) {
        Some((bracket, text)) if bracket.split(' ').any(is_count) => {
            let words: Vec<&str> = bracket.split(' ').filter(|word| !is_count(word)).collect();
            Cow::Owned(format!("[{}] {text}", words.join(" ")))
        }
        _ => Cow::Borrowed(name),
    }
}

/// The stage that a name tells, if it tells one.
fn stage(name: &str) -> &str {
    let Some((bracket, _)) = split(name) else { return "" };
    match bracket.rsplit_once(' ') {
        Some((stage, count)) if is_count(count) => stage,
        None if is_count(bracket) => "",
        _ => bracket,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_without_numbers() {
        assert_eq!(plain("[2/5] RUN x"), "[] RUN x");
        assert_eq!(plain("[build 2/5] RUN x 1/2"), "[build] RUN x 1/2");
        assert_eq!(plain("[linux/amd64 build 2/5] RUN x"), "[linux/amd64 build] RUN x");
        assert_eq!(plain("[internal] load build context"), "[internal] load build context");
        assert_eq!(plain("copy /a/1/2"), "copy /a/1/2");
        assert_eq!((stage("[build 2/5] RUN"), stage("[2/5] RUN"), stage("RUN")), ("build", "", ""));
    }
}
