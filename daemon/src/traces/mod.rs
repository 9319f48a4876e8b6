//! Traces of builds: what clients report of their own work (OpenTelemetry), and what the daemon did for them, as the
//! history keeps them.

mod stub;

use std::collections::HashMap;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kiln_proto::control::{BuildHistoryRecord, StatusResponse};
use kiln_proto::otlp::collector::trace::v1::ExportTraceServiceRequest;
use tonic::metadata::MetadataMap;

use stub::{Stub, TraceId};

/// How long spans are kept that no build has asked for.
const KEPT: Duration = Duration::from_secs(60);
/// Spans kept of all traces together; what comes beyond is dropped.
const MOST: usize = 20_000;

/// The place in a client's trace that a call belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TraceParent {
    trace: TraceId,
    span: stub::SpanId,
}

impl TraceParent {
    /// From a call's metadata, if the client traces.
    pub(crate) fn of(metadata: &MetadataMap) -> Option<Self> {
        Self::parse(metadata.get("traceparent")?.to_str().ok()?)
    }

    /// `VERSION-TRACE-SPAN-FLAGS`, in hex.
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let (_version, trace, span) = (parts.next()?, parts.next()?, parts.next()?);
        let (mut parent, mut any) = (Self { trace: [0; 16], span: [0; 8] }, 0);
        hex::decode_to_slice(trace, &mut parent.trace).ok()?;
        hex::decode_to_slice(span, &mut parent.span).ok()?;
        parent.trace.iter().for_each(|byte| any |= byte);
        (any != 0).then_some(parent)
    }
}

/// Spans that clients reported, until a build's record takes them.
#[derive(Default)]
pub(crate) struct Traces(Mutex<State>);

#[derive(Default)]
struct State {
    traces: HashMap<TraceId, Trace>,
    count: usize,
}

struct Trace {
    /// Encoded.
    spans: Vec<String>,
    last: Instant,
    /// How many builds will ask for it.
    wanted: usize,
}

impl Default for Trace {
    fn default() -> Self {
        Self { spans: Vec::new(), last: Instant::now(), wanted: 0 }
    }
}

impl State {
    fn clean(&mut self) {
        let mut count = 0;
        self.traces.retain(|_, trace| {
            let stays = trace.wanted > 0 || trace.last.elapsed() < KEPT;
            count += if stays { trace.spans.len() } else { 0 };
            stays
        });
        self.count = count;
    }
}

impl Traces {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what a client reports.
    pub(crate) fn add(&self, request: &ExportTraceServiceRequest) {
        let spans = stub::encode_reported(request);
        let mut state = self.lock();
        state.clean();
        for (id, span) in spans {
            if state.count >= MOST {
                break;
            }
            state.count += 1;
            let trace = state.traces.entry(id).or_default();
            trace.last = Instant::now();
            trace.spans.push(span);
        }
    }

    /// Keeps what belongs to a build's trace until the answer is dropped.
    pub(crate) fn want(self: &Arc<Self>, parent: TraceParent) -> Wanted {
        self.lock().traces.entry(parent.trace).or_default().wanted += 1;
        Wanted { traces: self.clone(), parent }
    }
}

/// The trace that a build belongs to.
pub(crate) struct Wanted {
    traces: Arc<Traces>,
    parent: TraceParent,
}

impl Wanted {
    fn spans(&self) -> Vec<String> {
        self.traces.lock().traces.get(&self.parent.trace).map(|trace| trace.spans.clone()).unwrap_or_default()
    }
}

impl Drop for Wanted {
    fn drop(&mut self) {
        let mut state = self.traces.lock();
        if let Some(trace) = state.traces.get_mut(&self.parent.trace) {
            trace.wanted -= 1;
            trace.last = Instant::now();
        }
    }
}

/// The spans of a build that has ended: its own, one for each time that a vertex ran, and those that its client
/// reported. One JSON object on each line.
pub(crate) fn write(
    out: &mut impl Write,
    record: &BuildHistoryRecord,
    log: &[StatusResponse],
    wanted: Option<&Wanted>,
) -> io::Result<()> {
    let (trace, parent) = match wanted {
        Some(wanted) => (wanted.parent.trace, Some(wanted.parent.span)),
        None => (rand::random(), None),
    };
    let build = Stub::build(trace, parent, record);
    writeln!(out, "{}", build.encode())?;
    for vertex in Stub::vertices(&build, log) {
        writeln!(out, "{}", vertex.encode())?;
    }
    for reported in wanted.map(Wanted::spans).unwrap_or_default() {
        writeln!(out, "{reported}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4a2cd8e337e673d578ca0b5db34f271c-d28e51ed66ddcc16-01";

    #[test]
    fn a_trace_parent() {
        let parent = TraceParent::parse(PARENT).expect("it is one");
        assert_eq!((parent.trace[0], parent.span[7]), (0x4a, 0x16));
        for wrong in ["", "00-4a-d2-01", "00-00000000000000000000000000000000-d28e51ed66ddcc16-01"] {
            assert_eq!(TraceParent::parse(wrong), None);
        }
    }

    #[test]
    fn reported_spans_wait_for_their_build() {
        use kiln_proto::otlp::trace::v1::{ResourceSpans, ScopeSpans, Span};
        let traces = Arc::new(Traces::default());
        let parent = TraceParent::parse(PARENT).expect("it is one");
        let span = |trace: &[u8]| Span {
            trace_id: trace.to_vec(),
            span_id: vec![1; 8],
            name: "ours".into(),
            ..Span::default()
        };
        let spans = vec![span(&parent.trace), span(&[7; 16]), span(b"short")];
        let scope_spans = vec![ScopeSpans { spans, ..ScopeSpans::default() }];
        let resource_spans = vec![ResourceSpans { scope_spans, ..ResourceSpans::default() }];
        traces.add(&ExportTraceServiceRequest { resource_spans });
        assert_eq!(traces.lock().count, 2);
        let wanted = traces.want(parent);
        assert_eq!(wanted.spans().len(), 1);
        for trace in traces.lock().traces.values_mut() {
            trace.last = Instant::now().checked_sub(2 * KEPT).expect("a clock that runs for some minutes");
        }
        traces.lock().clean();
        assert_eq!(traces.lock().traces.len(), 1);
        assert_eq!(wanted.spans().len(), 1);
        let mut text = Vec::new();
        write(&mut text, &BuildHistoryRecord::default(), &[], Some(&wanted)).expect("memory");
        let text = String::from_utf8(text).expect("text");
        assert_eq!(text.matches("\"TraceID\":\"4a2cd8e337e673d578ca0b5db34f271c\"").count(), 3);
    }
}
