//! Exporters: their attributes are checked before a build starts, and its results handed to them
//! when it has ended. What they send to the client goes through the client's session.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use kiln_cache::Ref;
use kiln_proto::control;
use kiln_session::Session;
use kiln_solver::progress::VertexProgress;
use kiln_worker::export::{
    ExportContext, ExportError, ExportInput, Exporter, Kind, NoOutput, Output, SessionOutput,
};
use kiln_worker::image::Access;
use tonic::Code;

use super::{CacheSource, EngineBuild};
use crate::error::BuildError;
use crate::provenance::Claim;

/// An exporter that a client asked for.
pub(crate) struct PlannedExport {
    index: usize,
    exporter: Exporter,
}

impl PlannedExport {
    /// What progress streams call it.
    pub(crate) fn title(&self) -> &'static str {
        self.exporter.name()
    }

    /// Whether it makes an image that stays here.
    pub(crate) fn is_image(&self) -> bool {
        self.exporter.attributes().kind == Kind::Image
    }
}

pub(super) fn failed(error: ExportError) -> BuildError {
    let code = match &error {
        ExportError::Attribute(_) => Code::InvalidArgument,
        ExportError::Internal(_) => Code::Internal,
        _ => Code::Unknown,
    };
    BuildError::new(code, error.to_string())
}

/// Checks the exporters of a request.
///
/// # Errors
/// One is not known, or its attributes make no sense or ask for what is not there.
pub(crate) fn plan(exporters: &[control::Exporter]) -> Result<Vec<PlannedExport>, BuildError> {
    let checked = |(index, wanted): (usize, &control::Exporter)| {
        let exporter = Exporter::new(&wanted.r#type, &wanted.attrs).map_err(failed)?;
        Ok(PlannedExport { index, exporter })
    };
    exporters.iter().enumerate().map(checked).collect()
}

impl EngineBuild {
    /// The exporters that the client asks for in view of the results, with numbers from `first`.
    ///
    /// # Errors
    /// The client failed, or asks for what is not there.
    pub(crate) async fn find_exporters(
        &self,
        first: usize,
        built: &Built,
        metadata: &BTreeMap<String, Vec<u8>>,
    ) -> Result<Vec<PlannedExport>, BuildError> {
        let refs = match built {
            Built::Single(result) => vec![result],
            Built::Map(results) => results.values().collect(),
        };
        let refs = refs.into_iter().flatten().map(|result| result.id().to_owned()).collect();
        let session = self.attached().await?;
        let metadata = metadata.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        let found = session.find_exporters(metadata, refs).await;
        let found = found.map_err(|error| BuildError::build(error.to_string()))?;
        let found =
            found.into_iter().map(|wanted| control::Exporter { r#type: wanted.r#type, attrs: wanted.attrs });
        let mut planned = plan(&found.collect::<Vec<_>>())?;
        planned.iter_mut().for_each(|export| export.index += first);
        Ok(planned)
    }

    /// Tells the client what came of all exporters.
    ///
    /// # Errors
    /// The client failed.
    pub(crate) async fn finalize_export(&self, response: &HashMap<String, String>) -> Result<(), BuildError> {
        let session = self.attached().await?;
        let told = session.finalize_export(response.clone()).await;
        told.map_err(|error| BuildError::build(error.to_string()))
    }
}

/// What a build came to.
pub(crate) enum Built {
    /// One file system.
    Single(Ref),
    /// One for each platform.
    Map(BTreeMap<String, Ref>),
}

/// Results with their metadata, ready for any number of exporters.
pub(crate) struct ExportSource(ExportInput);

impl ExportSource {
    /// # Errors
    /// The metadata does not describe the results.
    pub(crate) fn new(
        built: Built,
        metadata: BTreeMap<String, Vec<u8>>,
        claims: &[Claim],
        caches: Option<&BTreeMap<String, CacheSource>>,
    ) -> Result<Self, BuildError> {
        let input = match built {
            Built::Single(result) => ExportInput::single(result, metadata),
            Built::Map(results) => ExportInput::map(results, metadata),
        };
        let mut input = input.map_err(failed)?;
        for target in &mut input.targets {
            let of = claims.iter().filter(|claim| !input.is_map || claim.platform == target.id);
            target.attestations = of.map(|claim| claim.attestation.clone()).collect();
            let cache = |caches: &BTreeMap<String, CacheSource>| match input.is_map {
                true => caches.get(&target.id).cloned(),
                false => caches.values().next().cloned(),
            };
            target.cache = caches.and_then(cache);
        }
        Ok(Self(input))
    }
}

impl EngineBuild {
    /// Writes results to where the client wants them; gives the entries of the response.
    pub(crate) async fn export(
        &self,
        planned: &PlannedExport,
        source: &ExportSource,
        progress: &VertexProgress,
    ) -> Result<BTreeMap<String, String>, BuildError> {
        let context = self.export_context(progress);
        let output: Box<dyn Output> = match planned.exporter.attributes().kind {
            Kind::Image => Box::new(NoOutput),
            _ => Box::new(self.client(planned.index).await?),
        };
        planned.exporter.export(&context, &source.0, &*output).await.map_err(failed)
    }

    pub(super) fn export_context(&self, progress: &VertexProgress) -> ExportContext {
        let worker = self.worker.worker();
        let credentials = self.worker.credentials().clone();
        ExportContext {
            images: worker.images().clone(),
            store: worker.store().clone(),
            access: Access { credentials, progress: Some(progress.clone()) },
        }
    }

    async fn client(&self, exporter: usize) -> Result<SessionOutput, BuildError> {
        if self.session.is_empty() {
            return Err(BuildError::build("this output goes to the client, which attached no session"));
        }
        Ok(SessionOutput { session: self.attached().await?, exporter })
    }

    /// The client's session.
    pub(super) async fn attached(&self) -> Result<Arc<Session>, BuildError> {
        let session = self.engine.sessions.get(&self.session).await;
        session.map_err(|error| BuildError::new(Code::NotFound, error.to_string()))
    }
}
