//! Tells a client when what was built is not for the platforms that it asked for.

use std::collections::BTreeSet;

use kiln_proto::platform;
use kiln_solver::progress::{Event, ProgressSink, VertexWarning};

use crate::gateway::{Bridge, BuildResult, Refs, text_digest};
use crate::progress::Step;

const PLATFORM: &str = "platform";

/// Warns if the platforms of the result are not those of the request.
pub(super) fn verify(bridge: &Bridge, result: &BuildResult) {
    // The answer to a question is for no platform.
    if result.refs.all().is_empty() && !result.metadata.contains_key("refs.platforms") {
        return;
    }
    // A client that is itself the frontend may have told only the frontend that it uses.
    let asked = bridge.root().opts.get(PLATFORM).cloned();
    let asked = asked.or_else(|| {
        bridge.all_asked().iter().rev().find_map(|asked| asked.request.opts.get(PLATFORM).cloned())
    });
    let got = match &result.refs {
        Refs::Single(_) => None,
        Refs::Map(refs) => Some(refs.keys().map(String::as_str).collect::<Vec<_>>()),
    };
    let Some(short) = mismatch(asked.as_deref().unwrap_or_default(), got.as_deref()) else { return };
    let name = "verifying platforms of the result";
    let vertex = text_digest(name);
    let step = Step::start(bridge.progress().clone(), &vertex, name);
    bridge.progress().event(Event::Warning(VertexWarning {
        vertex,
        level: 1,
        short,
        detail: Vec::new(),
        url: String::new(),
        info: None,
        ranges: Vec::new(),
    }));
    step.end(None);
}

/// What is wrong with platforms `got` (`None`: the result states none) for those `asked` for.
fn mismatch(asked: &str, got: Option<&[&str]>) -> Option<String> {
    let names = |texts: &mut dyn Iterator<Item = &str>| -> Option<BTreeSet<String>> {
        texts.map(|text| Some(platform::format(&platform::parse(text).ok()?))).collect()
    };
    let wanted = match asked {
        "" => BTreeSet::from([platform::format(&platform::host())]),
        // What is no platform, the frontend has judged.
        asked => names(&mut asked.split(',').map(str::trim))?,
    };
    let Some(got) = got else {
        let text = "Multiple platforms requested but result is not multi-platform";
        return (wanted.len() > 1).then(|| text.to_owned());
    };
    let got = names(&mut got.iter().copied())?;
    let list = |set: &BTreeSet<String>| set.iter().map(String::as_str).collect::<Vec<_>>().join(",");
    (wanted != got).then(|| {
        format!("Requested platforms {} do not match result platforms {}", list(&wanted), list(&got))
    })
}

#[cfg(test)]
mod tests {
    use super::mismatch;

    #[test]
    fn results_for_other_platforms() {
        let two = ["linux/amd64", "linux/arm64"];
        assert_eq!(mismatch("linux/arm64,linux/amd64", Some(&two)), None);
        assert_eq!(mismatch("linux/x86_64", Some(&["linux/amd64"])), None);
        assert_eq!(mismatch("", None), None);
        assert_eq!(mismatch("linux/arm64", None), None);
        let text = mismatch("linux/amd64,linux/arm64", None).expect("a warning");
        assert_eq!(text, "Multiple platforms requested but result is not multi-platform");
        let text = mismatch("", Some(&two)).expect("a warning");
        assert!(text.ends_with("do not match result platforms linux/amd64,linux/arm64"), "{text}");
        assert_eq!(mismatch("linux/amd64", Some(&["not a platform"])), None);
    }
}
