//! Builds that the history has let go, of which a graph is kept: when many others build, a project's last build is still
//! there to compare its next one with.

use std::sync::Arc;

use kiln_cache::StoreError;
use prost::Message;

use super::{Explanations, OUTLINES, RECORDS, Record};

/// At most so many graphs are kept, of so many vertices each.
const MOST: usize = 128;
const LARGEST: u32 = 10_000;

impl Explanations {
    /// Forgets a build that nobody asked to forget: what its project has nothing newer for stays for comparison.
    pub(crate) fn retire(self: &Arc<Self>, id: &str) -> Result<(), StoreError> {
        let mut gone = Vec::new();
        {
            let mut state = self.lock();
            let records = self.records(&mut state)?;
            let Some(place) = records.iter().position(|(other, _)| other == id) else {
                drop(state);
                return self.forget(id);
            };
            let (earlier, later) = records.split_at(place + 1);
            let record = &earlier[place].1;
            let of_project = |(_, other): &&(String, Record)| other.project == record.project;
            if record.vertices > LARGEST || later.iter().any(|other| of_project(&other)) {
                gone.push(id.to_owned());
            } else {
                let retired = |(_, other): &&(String, Record)| other.retired;
                let superseded = earlier[..place].iter().filter(retired).filter(of_project);
                gone.extend(superseded.map(|(id, _)| id.clone()));
                let others: Vec<_> = records
                    .iter()
                    .filter(retired)
                    .map(|(id, _)| id)
                    .filter(|id| !gone.contains(id))
                    .collect();
                let excess = (others.len() + 1).saturating_sub(MOST);
                let excess: Vec<String> = others[..excess].iter().map(|id| (*id).clone()).collect();
                gone.extend(excess);
                let record = Record { retired: true, before: Vec::new(), ..record.clone() };
                self.values.delete(OUTLINES, id)?;
                self.values.put(RECORDS, id, &record.encode_to_vec())?;
                let former = std::mem::replace(&mut records[place].1, record);
                state.loose.extend(former.before);
            }
        }
        gone.iter().try_for_each(|id| self.forget(id))
    }
}
