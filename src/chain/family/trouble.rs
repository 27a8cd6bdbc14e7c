//! What is wrong with a link, and what mends it.

use std::path::Path;

use crate::chain::family::Member;
use crate::error::{Error, ErrorKind};
use crate::util::text::printable;

/// What sort of thing is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// The images lie below each other in a circle.
    Cycle,
    /// What lies below is not there.
    Missing,
    /// It is not where it was, but is somewhere else among the images looked at.
    Moved,
    /// Another image is in its place.
    Replaced,
    /// It lies where the policy does not let anybody look.
    Outside,
    /// It is there and cannot be read.
    Unreadable,
    /// It was changed since the image above was made.
    Changed,
    /// Its disk is shorter: what lies past its end reads as zeroes.  That may be meant.
    Shorter,
}

impl Fault {
    /// In one word, for people and programs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cycle => "cycle",
            Self::Missing => "missing",
            Self::Moved => "moved",
            Self::Replaced => "replaced",
            Self::Outside => "outside",
            Self::Unreadable => "unreadable",
            Self::Changed => "changed",
            Self::Shorter => "shorter",
        }
    }

    /// Whether the image cannot be read, or not as it was, for it.
    pub fn is_wrong(self) -> bool {
        self != Self::Shorter
    }
}

/// Something that is wrong with what lies below an image.
#[derive(Debug, Clone)]
pub struct Trouble {
    /// What sort of thing.
    pub fault: Fault,
    /// In words, without the name of the image.
    pub text: String,
    /// What mends it.
    pub remedy: Option<Remedy>,
}

/// An image that another is to be linked to anew, by name alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Remedy {
    /// An index of [`super::Family::members`].
    pub parent: usize,
    /// Whether it is the image meant: its identity says so.  Otherwise only its name does, or it
    /// was changed, and the user must know.
    pub is_sure: bool,
}

impl Trouble {
    /// What every other command says of a link; `is_there`: the image meant is, in another state.
    pub(super) fn new(error: &Error, is_there: bool) -> Self {
        let fault = match error.kind() {
            _ if is_there => Fault::Changed,
            ErrorKind::NotFound => Fault::Missing,
            ErrorKind::Denied => Fault::Outside,
            _ => Fault::Unreadable,
        };
        let text = match std::error::Error::source(error) {
            Some(cause) => format!("{}: {cause}", error.message()),
            None => error.message().to_owned(),
        };
        Self {
            fault,
            text,
            remedy: None,
        }
    }
}

/// Finds what only the whole family shows: cycles, images that moved or were replaced, and sizes;
/// and what mends each.
pub(super) fn judge(members: &mut [Member]) {
    let on_cycle = cycles(members);
    let found: Vec<_> = (0..members.len())
        .map(|index| search(members, index))
        .collect();
    for (index, (identified, called)) in found.into_iter().enumerate() {
        let replaced = is_replaced(members, index);
        let shorter = shorter(members, index);
        let elsewhere = identified.and_then(|at| members[at].info.path.clone());
        let parent = members[index].parent;
        let member = &mut members[index];
        for trouble in &mut member.troubles {
            match trouble.fault {
                Fault::Unreadable if replaced => trouble.fault = Fault::Replaced,
                Fault::Missing if identified.is_some() => trouble.fault = Fault::Moved,
                _ => {}
            }
            let sure = |parent| Remedy {
                parent,
                is_sure: true,
            };
            let likely = |parent| Remedy {
                parent,
                is_sure: false,
            };
            trouble.remedy = match trouble.fault {
                Fault::Changed => parent.map(likely),
                Fault::Missing | Fault::Moved | Fault::Replaced if !member.names.is_empty() => {
                    identified.map(sure).or(called.map(likely))
                }
                _ => None,
            };
            if let (Fault::Moved, true, Some(path)) =
                (trouble.fault, member.names.is_empty(), &elsewhere)
            {
                // There is no name in it that could be changed.
                let found = format!("; that is {}", printable(path));
                trouble.text.push_str(&found);
            }
        }
        member.troubles.extend(shorter);
        if on_cycle[index] {
            member.troubles.push(Trouble {
                fault: Fault::Cycle,
                text: "lies below itself".to_owned(),
                remedy: None,
            });
        }
        member.troubles.sort_by_key(|trouble| trouble.fault);
    }
}

/// By image, whether it lies below itself.
fn cycles(members: &[Member]) -> Vec<bool> {
    let mut on_cycle = vec![false; members.len()];
    // The walk that came by first: 0 none, else its number.
    let mut walked = vec![0_usize; members.len()];
    for start in 0..members.len() {
        let (mut at, walk) = (Some(start), start + 1);
        while let Some(index) = at.filter(|index| walked[*index] == 0) {
            walked[index] = walk;
            at = members[index].parent;
        }
        // Back on its own way: the rest of it from here on is the cycle.
        while let Some(index) = at.filter(|i| walked[*i] == walk && !on_cycle[*i]) {
            on_cycle[index] = true;
            at = members[index].parent;
        }
    }
    on_cycle
}

/// The image that one has below it by its identity, and one that is called as it was.
fn search(members: &[Member], index: usize) -> (Option<usize>, Option<usize>) {
    let member = &members[index];
    let Some(backing) = &member.info.backing else {
        return (None, None);
    };
    if member.troubles.is_empty() {
        return (None, None);
    }
    let only = |is_it: &dyn Fn(&Member) -> bool| {
        let mut those = (0..members.len()).filter(|i| *i != index && is_it(&members[*i]));
        let first = those.next()?;
        those.next().is_none().then_some(first)
    };
    let wanted = backing.identity.filter(|uuid| !uuid.is_nil());
    let identified = wanted.and_then(|uuid| {
        let of_state = only(&|m: &Member| {
            m.identity == Some(uuid) && (backing.state.is_none() || m.state == backing.state)
        });
        of_state.or_else(|| only(&|m: &Member| m.identity == Some(uuid)))
    });
    let name = backing.names.first().map(|name| Path::new(&name.path));
    let name = name.and_then(Path::file_name);
    let format = backing.format.as_deref();
    let called = name.filter(|_| wanted.is_none()).and_then(|name| {
        only(&|m: &Member| {
            let is_called = m.info.path.as_deref().and_then(Path::file_name) == Some(name);
            is_called && format.is_none_or(|format| m.driver.is_called(format))
        })
    });
    (identified, called)
}

/// Whether a name leads to an image that is another than the one recorded.
fn is_replaced(members: &[Member], index: usize) -> bool {
    let member = &members[index];
    let wanted = member.info.backing.as_ref().and_then(|b| b.identity);
    let Some(wanted) = wanted.filter(|uuid| !uuid.is_nil()) else {
        return false;
    };
    let mut leads = member.names.iter().filter_map(|n| n.leads_to.as_ref().ok());
    leads.any(|found| members[*found].identity != Some(wanted))
}

fn shorter(members: &[Member], index: usize) -> Option<Trouble> {
    let (own, below) = (&members[index].info, &members[members[index].parent?].info);
    let text = format!(
        "the disk below has {} bytes, its own {}",
        below.virtual_size, own.virtual_size
    );
    (below.virtual_size < own.virtual_size).then_some(Trouble {
        fault: Fault::Shorter,
        text,
        remedy: None,
    })
}
