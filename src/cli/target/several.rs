//! Putting the files of an image into place, so that they appear together.
//!
//! One rename is one moment, and two names take two.  So where a further file takes the place of
//! one that is there, the new image first names that file by another name, its generation, which
//! nobody else knows.  The image is renamed into place: from that moment on all of the new is
//! there, whatever the file's own name leads to.  Then the file takes its own name as well, the
//! image is made to name it so, and the other name goes.

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::stale::Kind;
use super::temp::Temp;
use super::{Durable, Existing, New, Other, Target};
use crate::cli::removed::{Removed, parent};
use crate::error::{Error, Result};

/// Has the image at a path name its further files so, durably, and as a whole or not at all.
pub type Rename<'a> = &'a dyn Fn(&Path, &[PathBuf]) -> Result<()>;

/// What the names of new content are, of the further files of `image`.
pub(super) fn generation(image: &New) -> Kind<'_> {
    let home = std::fs::metadata(parent(&image.path));
    Kind::Generation {
        image: image.path.file_name().unwrap_or_default(),
        home: home.map_or(0, |found| found.ino()),
    }
}

/// The new content of a further file, under a name of its own.
struct Generation<'a> {
    other: &'a Other,
    temp: &'a Temp,
    name: OsString,
}

impl Generation<'_> {
    /// What the image calls it.
    fn recorded(&self) -> PathBuf {
        let New { given, path, .. } = &self.other.new;
        let home = |path| std::fs::canonicalize(parent(path)).ok();
        match home(given) == home(path) {
            true => self.other.recorded.with_file_name(&self.name),
            // Through a symbolic link: it lies beside the file, not beside the link.
            false => {
                let home = home(path).unwrap_or_else(|| parent(path).to_owned());
                home.join(&self.name)
            }
        }
    }

    fn unlink(&self) {
        drop(Removed::make(self.temp.directory(), &self.name, || Ok(())));
    }
}

/// How files are put into place.
struct Placing<'a> {
    image: &'a New,
    others: &'a [Other],
    durable: bool,
    rename: Rename<'a>,
    /// Told whenever names have changed.
    seen: &'a mut dyn FnMut(),
}

impl Target {
    /// As [`Target::commit`], of an image of several files.
    ///
    /// # Errors
    /// The host's, those of `rename`; then all names stand for what they stood for before, or the
    /// image is the new one, and the error says what it calls its files.
    pub fn commit_named(self, durable: Durable, rename: Rename<'_>) -> Result<()> {
        self.commit_seen(durable, rename, &mut || {})
    }

    pub(super) fn commit_seen(
        self,
        durable: Durable,
        rename: Rename<'_>,
        seen: &mut dyn FnMut(),
    ) -> Result<()> {
        let durable = durable == Durable::Yes || self.all().any(New::replaces);
        let settles = |new: &&New| durable || matches!(new.existing, Existing::Device(_));
        self.all().filter(settles).try_for_each(New::sync)?;
        Placing {
            image: &self.image,
            others: &self.others,
            durable,
            rename,
            seen,
        }
        .place()
    }
}

impl<'a> Placing<'a> {
    fn place(mut self) -> Result<()> {
        let generations = self.generations()?;
        let placed = self.place_free().and_then(|made| {
            self.put(self.image)?;
            made.into_iter().for_each(Removed::keep);
            Ok(())
        });
        if let Err(e) = placed {
            generations.iter().for_each(Generation::unlink);
            return Err(e);
        }
        let synced = self.sync_directory(self.image);
        synced.map_err(|e| self.in_place(e, &generations))?;
        self.own_names(&generations)?;
        let kind = generation(self.image);
        for other in self.others {
            let Some(temp) = &other.new.temp else {
                continue;
            };
            for name in &other.left {
                kind.remove(temp.directory(), &other.new.path, name);
            }
        }
        Ok(())
    }

    /// Whether the file takes the place of another that the old image may need.
    fn is_taken(&self, other: &Other) -> bool {
        self.image.temp.is_some() && other.new.replaces()
    }

    /// Gives new content that takes the place of old a name of its own, and has the image, which
    /// nobody sees yet, name it so.
    fn generations(&mut self) -> Result<Vec<Generation<'a>>> {
        let kind = generation(self.image);
        let mut generations = Vec::new();
        let mut guards = Vec::new();
        for other in self.others.iter().filter(|other| self.is_taken(other)) {
            let Some(temp) = &other.new.temp else {
                continue;
            };
            let linked = temp.linked(kind);
            let (guard, name) =
                linked.map_err(|e| other.new.fail("give the new file a name of its own", e))?;
            guards.push(guard);
            generations.push(Generation { other, temp, name });
            self.sync_directory(&other.new)?;
        }
        if !generations.is_empty() {
            let path = self.image.written();
            let (meanwhile, own) = (self.meanwhile(&generations), self.own());
            // There and back: whether the last step can be made is known before the first.
            for names in [&meanwhile, &own, &meanwhile] {
                let renamed = (self.rename)(path, names).map_err(|e| self.image.name(e));
                renamed.map_err(|e| {
                    e.noted(
                        "so it cannot be replaced together with its data file; remove that first",
                    )
                })?;
            }
            if self.durable {
                self.image.sync()?;
            }
            (self.seen)();
        }
        // From now on an image may need them, whatever ends this process.
        guards.into_iter().for_each(Removed::keep);
        Ok(generations)
    }

    /// Puts the files into place that take nobody's, or that no old image can be kept whole
    /// with; the names that are new.
    fn place_free(&mut self) -> Result<Vec<Removed>> {
        let mut made = Vec::new();
        for other in self.others {
            if self.is_taken(other) {
                continue;
            }
            self.put(&other.new)?;
            if let (Some(temp), false) = (&other.new.temp, other.new.replaces()) {
                let guard = Removed::make(temp.directory(), other.new.file_name(), || Ok(()));
                made.push(guard.map_err(|e| other.new.fail("watch", e))?.0);
            }
            self.sync_directory(&other.new)?;
        }
        Ok(made)
    }

    /// Puts a file under its name.
    fn put(&mut self, new: &New) -> Result<()> {
        let Some(temp) = &new.temp else {
            return Ok(());
        };
        let placed = match new.replaces() {
            true => temp.replace_alone(new.file_name()),
            false => temp.place_new(new.file_name()),
        };
        placed.map_err(|e| new.fail("rename the new image into place", e))?;
        (self.seen)();
        Ok(())
    }

    /// Puts new content under its own name, and has the image name it so.
    fn own_names(&mut self, generations: &[Generation<'_>]) -> Result<()> {
        if generations.is_empty() {
            return Ok(());
        }
        let named = self.try_own_names(generations);
        named.map_err(|e| self.in_place(e, generations))?;
        generations.iter().for_each(Generation::unlink);
        (self.seen)();
        Ok(())
    }

    /// An error after the image was put into place.
    fn in_place(&self, e: Error, generations: &[Generation<'_>]) -> Error {
        let names = match generations.is_empty() {
            true => self.own(),
            false => self.meanwhile(generations),
        };
        let names: Vec<_> = names.iter().map(|n| n.to_string_lossy()).collect();
        let files = match names.is_empty() {
            true => String::new(),
            false => format!(", with the files {}", names.join(", ")),
        };
        e.noted(format!("the new image is in place and whole{files}"))
    }

    fn try_own_names(&mut self, generations: &[Generation<'_>]) -> Result<()> {
        for Generation { other, temp, .. } in generations {
            let New { path, .. } = &other.new;
            temp.replace(path.file_name().unwrap_or_default())
                .map_err(|e| other.new.fail("rename the new file into place", e))?;
            (self.seen)();
            self.sync_directory(&other.new)?;
        }
        // By what is open: its name may lead to another image by now.
        let opened = self.image.temp.as_ref().and_then(Temp::opened);
        let path = opened.as_deref().unwrap_or(&self.image.path);
        let renamed = (self.rename)(path, &self.own());
        renamed.map_err(|e| e.renamed(path, &self.image.given).at(&self.image.given))?;
        (self.seen)();
        Ok(())
    }

    /// What the image calls its further files in the end.
    fn own(&self) -> Vec<PathBuf> {
        self.others.iter().map(|o| o.recorded.clone()).collect()
    }

    /// What it calls them until then.
    fn meanwhile(&self, generations: &[Generation<'_>]) -> Vec<PathBuf> {
        let name = |other: &Other| {
            let found = generations.iter().find(|g| std::ptr::eq(g.other, other));
            found.map_or_else(|| other.recorded.clone(), Generation::recorded)
        };
        self.others.iter().map(name).collect()
    }

    fn sync_directory(&self, new: &New) -> Result<()> {
        match self.durable {
            true => new.sync_directory(),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::cli::target::listed::names;
    use crate::error::ErrorKind;

    /// An image is a line: its version, then the names of its files, each of which holds the
    /// version that it belongs to.  Which one it is; `None`: there is none.
    fn version(dir: &Path) -> Option<String> {
        let line = std::fs::read_to_string(dir.join("image")).ok()?;
        let (version, names) = line.split_once(' ').expect("is a line");
        for name in names.split(' ') {
            let found = std::fs::read_to_string(dir.join(name));
            let found = found.unwrap_or_else(|e| panic!("{name} of {version}: {e}"));
            assert_eq!(found, version, "{name}");
        }
        Some(version.to_owned())
    }

    fn rename(path: &Path, names: &[PathBuf]) -> Result<()> {
        let line = std::fs::read_to_string(path).expect("reads");
        let version = line.split(' ').next().expect("has one").to_owned();
        let line = names
            .iter()
            .fold(version, |line, name| format!("{line} {}", name.display()));
        std::fs::write(path, line).map_err(|e| crate::Error::io("write", e))
    }

    /// Which of the names are taken before, and by what.
    const BEFORE: [&[(&str, &str)]; 5] = [
        &[],
        &[("image", "old a b"), ("a", "old"), ("b", "old")],
        &[("image", "old x"), ("x", "old"), ("b", "foreign")],
        &[("image", "old x"), ("x", "old")],
        &[("a", "foreign"), ("b", "foreign")],
    ];

    fn begun(dir: &Path, before: &[(&str, &str)]) -> Target {
        for (name, text) in before {
            std::fs::write(dir.join(name), text).expect("writes");
        }
        let mut target = Target::begin(&dir.join("image")).expect("begins");
        std::fs::write(target.path(), "new a b").expect("writes");
        for name in ["a", "b"] {
            target.add(&dir.join(name), Path::new(name)).expect("adds");
        }
        for path in target.others() {
            std::fs::write(path, "new").expect("writes");
        }
        target
    }

    #[test]
    fn at_every_moment_all_files_are_old_or_all_are_new() {
        for before in BEFORE {
            let dir = tempfile::tempdir().expect("a directory");
            let dir = dir.path();
            let target = begun(dir, before);
            let old = version(dir);
            let mut seen = vec![version(dir)];
            target
                .commit_seen(Durable::Yes, &rename, &mut || seen.push(version(dir)))
                .expect("commits");
            let turn = seen.iter().position(|v| *v != old).expect("became new");
            assert!(
                seen[turn..].iter().all(|v| v.as_deref() == Some("new")),
                "{seen:?}"
            );
            let mut left = vec!["a", "b", "image"];
            left.extend(
                before
                    .iter()
                    .map(|(name, _)| *name)
                    .filter(|name| *name == "x"),
            );
            assert_eq!(names(dir), left, "{before:?}");
        }
    }

    #[test]
    fn whatever_fails_leaves_the_old_image_or_the_new_one() {
        for before in BEFORE {
            for fails in 0..4 {
                let dir = tempfile::tempdir().expect("a directory");
                let dir = dir.path();
                let target = begun(dir, before);
                let old = version(dir);
                let calls = Cell::new(0);
                let result = target.commit_named(Durable::WhenReplacing, &|path, names| {
                    calls.set(calls.get() + 1);
                    match calls.get() == fails + 1 {
                        true => Err(crate::Error::new(ErrorKind::Io, "failed")),
                        false => rename(path, names),
                    }
                });
                match (result, calls.get() > fails) {
                    // The last call is made when the image is in place.
                    (Err(e), true) if fails == 3 => {
                        assert!(e.to_string().contains(".data"), "{e}");
                        assert_eq!(version(dir).as_deref(), Some("new"));
                    }
                    (Err(_), true) => {
                        assert_eq!(version(dir), old);
                        assert_eq!(names(dir).len(), before.len());
                    }
                    (result, _) => result.expect("nothing failed"),
                }
                // The next run finds its way, and cleans up.
                begun(dir, &[])
                    .commit_named(Durable::Yes, &rename)
                    .expect("commits");
                assert_eq!(version(dir).as_deref(), Some("new"));
                assert!(names(dir).iter().all(|name| !name.starts_with('.')));
            }
        }
    }

    #[test]
    fn another_image_that_comes_under_the_name_is_left_alone() {
        let home = tempfile::tempdir().expect("a directory");
        let [dir, decoy, aside] = ["dir", "decoy", "aside"].map(|name| home.path().join(name));
        std::fs::create_dir(&dir).expect("makes");
        std::fs::create_dir(&decoy).expect("makes");
        std::fs::write(decoy.join("image"), "mine x").expect("writes");
        let target = begun(&dir, BEFORE[1]);
        let mut moves = 0;
        let mut seen = || {
            moves += 1;
            // The image is in place, and does not have the names that it is to have yet.
            if moves == 2 {
                std::fs::rename(&dir, &aside).expect("renames");
                std::fs::rename(&decoy, &dir).expect("renames");
            }
        };
        let done = target.commit_seen(Durable::Yes, &rename, &mut seen);
        done.expect("commits");
        let text = std::fs::read_to_string(dir.join("image")).expect("reads");
        assert_eq!(text, "mine x");
        assert_eq!(version(&aside).as_deref(), Some("new"));
    }

    #[test]
    fn a_name_that_was_taken_meanwhile_is_kept_and_nothing_is_left() {
        let dir = tempfile::tempdir().expect("a directory");
        let dir = dir.path();
        let target = begun(dir, &[]);
        std::fs::write(dir.join("image"), "mine a").expect("writes");
        let result = target.commit_named(Durable::Yes, &rename);
        result.expect_err("is taken");
        assert_eq!(names(dir), ["image"]);
    }
}
