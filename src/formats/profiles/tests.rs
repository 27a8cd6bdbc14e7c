//! The table itself.

use std::collections::HashSet;

use super::*;
use crate::formats;
use crate::image::options::OptionValues;

#[test]
fn every_profile_names_a_format_and_options_that_it_takes() {
    let mut names = HashSet::new();
    for profile in PROFILES {
        assert!(names.insert(profile.name), "{}", profile.name);
        let known = formats::named(profile.format).is_ok();
        // A format that is known and not there is refused by name when it is asked for.
        let refused = formats::refused::by_name(profile.format).is_some();
        assert!(known || refused, "{}", profile.name);
        if let Ok(driver) = formats::named(profile.format)
            && let Some(creator) = &driver.creator
        {
            OptionValues::parse(creator.options, driver.name, profile.options).expect(profile.name);
        }
        assert!(named(profile.name).is_ok_and(|found| found.name == profile.name));
    }
    named("nowhere").expect_err("is no place");
}

#[test]
fn every_rule_has_a_name_a_text_and_a_source_that_says_whose_it_is() {
    for profile in PROFILES {
        let mut names = HashSet::new();
        for rule in profile.rules {
            assert!(names.insert(rule.name), "{} {}", profile.name, rule.name);
            assert!(!rule.text.is_empty() && !rule.source.is_empty());
            let is_maker = ["Microsoft:", "VMware:", "AWS:", "source of "];
            let begins = is_maker.iter().any(|maker| rule.source.starts_with(maker));
            assert_eq!(rule.is_makers_own, begins, "{}", rule.source);
        }
    }
}
