//! All domains in one look, for what compares them with something else.

use std::collections::{HashMap, HashSet};

use super::domain_xml::Facts;
use super::{Connection, Domain, DomainState, InUse, failure};
use crate::Result;

/// A domain as the look found it.
#[derive(Debug)]
pub struct Surveyed {
    /// The domain, to act on.
    pub domain: Domain,
    /// What it does.
    pub state: DomainState,
    /// Whether the host starts it at boot.
    pub autostart: bool,
    /// Whether libvirt keeps a definition of it.
    pub persistent: bool,
    /// What its description says.
    pub facts: Facts,
}

impl Surveyed {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.domain.name()
    }

    /// Whether there is a QEMU process of it.
    #[must_use]
    pub fn is_up(&self) -> bool {
        !matches!(self.state, DomainState::ShutOff | DomainState::Crashed)
    }
}

/// Every domain of the host, and what they use together.
#[derive(Debug, Default)]
pub struct Survey {
    /// The domains, by name.
    pub domains: Vec<Surveyed>,
    /// What they use.
    pub in_use: InUse,
}

impl Survey {
    /// The domain called `name`.
    #[must_use]
    pub fn domain(&self, name: &str) -> Option<&Surveyed> {
        self.domains.iter().find(|domain| domain.name() == name)
    }
}

impl Connection {
    /// Looks at every domain: states and flags from one question each for all of them, then the descriptions. One that
    /// vanishes meanwhile is left out.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn survey(&self) -> Result<Survey> {
        let states: HashMap<String, DomainState> = self.domain_states()?.into_iter().collect();
        let flagged = |flag| -> Result<HashSet<String>> {
            let list = self.raw().list_all_domains(flag).map_err(|e| failure("cannot list domains", &e))?;
            Ok(list.iter().filter_map(|raw| raw.name().ok()).collect())
        };
        let autostart = flagged(virt_sys::VIR_CONNECT_LIST_DOMAINS_AUTOSTART)?;
        let persistent = flagged(virt_sys::VIR_CONNECT_LIST_DOMAINS_PERSISTENT)?;
        let mut survey = Survey::default();
        let mut pools = HashMap::new();
        for domain in self.domains()? {
            let name = domain.name().to_owned();
            let Some(state) = states.get(&name).copied() else { continue };
            let mut now = None;
            for xml in domain.descriptions()? {
                let facts = Facts::parse(&xml)?;
                survey.in_use.add(self, &mut pools, &name, &facts);
                now.get_or_insert(facts);
            }
            let Some(facts) = now else { continue };
            survey.domains.push(Surveyed {
                state,
                autostart: autostart.contains(&name),
                persistent: persistent.contains(&name),
                facts,
                domain,
            });
        }
        survey.domains.sort_by(|a, b| a.name().cmp(b.name()));
        Ok(survey)
    }
}
