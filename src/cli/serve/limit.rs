//! `--limit`, and `ctl limit`: for which exports, in which group, what.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use super::report;
use crate::backend::{Group, Limits};
use crate::cli::exit::usage;
use crate::server::Export;
use crate::util::text::printable;

/// One `--limit`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    /// The export it is for; `None`: each.
    pub export: Option<String>,
    /// The group whose limits it joins; `None`: none.
    pub group: Option<String>,
    /// What is limited; `None` where only a group was named.
    pub limits: Option<Limits>,
}

/// A limit as it is typed: `[NAME:]KEY=VALUE,..`.
///
/// # Errors
/// Says what is wrong with it.
pub(super) fn parse(text: &str) -> Result<Limit, String> {
    let (export, pairs) = match text.split_once(':') {
        Some((export, pairs)) => (Some(export.to_owned()), pairs),
        None => (None, text),
    };
    if pairs.is_empty() {
        return Err("nothing is limited".to_owned());
    }
    let mut group = None;
    let mut others = Vec::new();
    for pair in pairs.split(',') {
        match pair.split_once('=') {
            Some(("group", "")) => return Err("the group has no name".to_owned()),
            Some(("group", name)) => group = Some(name.to_owned()),
            _ => others.push(pair),
        }
    }
    let limits = match others.is_empty() {
        true => None,
        false => {
            let limits = Limits::parse(others.into_iter()).map_err(|e| e.to_string())?;
            Some(limits)
        }
    };
    Ok(Limit {
        export,
        group,
        limits,
    })
}

/// Puts exports under what was typed.
///
/// # Errors
/// A usage error for an export or a group that is not there, and for a group with two limits.
pub(super) fn apply(limits: &[Limit], exports: &[Export]) -> anyhow::Result<()> {
    let mut groups: BTreeMap<&str, Arc<Group>> = BTreeMap::new();
    for limit in limits {
        if let (Some(name), Some(rates)) = (&limit.group, limit.limits) {
            let group = Arc::new(Group::new(rates));
            if groups.insert(name, group).is_some() {
                let name = printable(name);
                return Err(usage(format!("--limit: group '{name}' has limits already")));
            }
        }
    }
    for limit in limits {
        let group = match (&limit.group, limit.limits) {
            (Some(name), _) => Some(groups.get(&**name).cloned().ok_or_else(|| {
                let name = printable(name);
                usage(format!("--limit: group '{name}' has no limits"))
            })?),
            (None, _) => None,
        };
        let mut found = false;
        for export in exports {
            if limit
                .export
                .as_ref()
                .is_none_or(|name| *name == export.name)
            {
                found = true;
                let own = || Arc::new(Group::new(limit.limits.unwrap_or_default()));
                let group = group.clone().unwrap_or_else(own);
                export.backend.set_group(Some(&group));
            }
        }
        if let (false, Some(name)) = (found, &limit.export) {
            let name = printable(name);
            return Err(usage(format!("--limit: no export is called '{name}'")));
        }
    }
    Ok(())
}

/// Sets other limits for an export, and for those that share its group.
///
/// # Errors
/// A usage error for limits that make no sense.
pub(super) fn change(export: &Export, text: &str) -> anyhow::Result<Value> {
    let limits = match text {
        "none" => Limits::none(),
        text => Limits::parse(text.split(',')).map_err(|e| usage(e.message()))?,
    };
    match export.backend.limits() {
        Some(place) => place.group().set(limits),
        None => export
            .backend
            .set_group(Some(&Arc::new(Group::new(limits)))),
    }
    Ok(report::limits(&limits))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::throttle::Key;

    #[test]
    fn a_limit_may_name_an_export_and_a_group() {
        let limit = parse("a:iops=5,group=g,bps=1M").expect("is right");
        assert_eq!(limit.export.as_deref(), Some("a"));
        assert_eq!(limit.group.as_deref(), Some("g"));
        let rate = limit.limits.and_then(|l| l.rate(Key::Bps));
        assert_eq!(rate.map(|r| r.average), Some(1 << 20));
        assert_eq!(parse("group=g").expect("is right").limits, None);
        for wrong in ["", "group=", "bps", "x:y:z", "bps=1,bps-wr=1"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
