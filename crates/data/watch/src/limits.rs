//! How long a volume may stand still for a backup.

use std::time::Duration;

/// Longest that the freezing call itself may take.
pub(crate) const PATIENCE_MAX: Duration = Duration::from_secs(60);

/// How long a volume may stand still for a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreezeLimits {
    /// What a freeze is to last at most, as far as it can be foreseen.
    pub budget: Duration,
    /// Then it is thawed whatever happens: the guard's dead man's limit.
    pub limit: Duration,
    /// How long the freezing call may take, in which the file system writes what is dirty; cut to 60 s. Writers wait meanwhile.
    pub patience: Duration,
    /// What if what is left does not fit the budget.
    pub over: OverBudget,
    /// Rounds of copying before it is said that it never will.
    pub rounds: u32,
}

impl Default for FreezeLimits {
    fn default() -> Self {
        Self {
            budget: Duration::from_millis(100),
            limit: Duration::from_secs(5),
            patience: PATIENCE_MAX,
            over: OverBudget::GiveUp,
            rounds: 30,
        }
    }
}

/// What happens if what is left does not fit the budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OverBudget {
    /// The backup ends; nothing is lost.
    GiveUp,
    /// It is frozen for longer, up to the limit.
    Longer,
}
