"""Guides as data: symptoms and remedies, ways to save time and memory, and what to tune in which order."""

from __future__ import annotations

from typing import Any

TROUBLESHOOTING_GUIDE: dict[str, dict[str, list[str]]] = {
    "training_instability": {
        "symptoms": ["Loss spikes", "Q-value collapse", "Gradient explosion"],
        "solutions": [
            "Reduce learning rates by 50 % (optimizers.*.schedule.peak_lr)",
            "Clip gradients harder (optimizers.*.clip_gradient_norm)",
            "Increase agent.loss_weights.bc_weight",
            "Reduce agent.best_of_n_samples to decrease variance",
        ],
    },
    "poor_evaluation_performance": {
        "symptoms": ["Low episode rewards", "High evaluation variance"],
        "solutions": [
            "Increase agent.best_of_n_samples",
            "Increase agent.loss_weights.bc_weight",
            "Check that what is served passes the same transforms (acrlpd data inspect)",
            "Check that evaluation meets the tasks of the training data",
        ],
    },
    "online_below_offline": {
        "symptoms": ["Success falls when the online phase begins"],
        "solutions": [
            "Raise data.online_ratio_episodes: few own episodes then fill less of a batch",
            "Lower agent.best_of_n_samples: a choice among fewer exploits the critic's errors less",
            "Collect alone at first (warmup_env_steps)",
            "Lower the learning rates",
        ],
    },
    "memory_issues": {
        "symptoms": ["Out of memory", "Slow batch generation"],
        "solutions": [
            "agent.best_of_n_strategy chunked",
            "Smaller pieces of a batch (agent.gradient_accumulation_steps)",
            "policy.remat",
            "Reduce agent.critic.num_critics",
        ],
    },
    "convergence_issues": {
        "symptoms": ["Plateaued learning", "Oscillating losses"],
        "solutions": [
            "Let the learning rate decay (optimizers.*.schedule.decay_steps)",
            "Move the target faster (agent.target_update_tau)",
            "Balance agent.loss_weights",
            "Check data and episode ends (acrlpd data validate)",
        ],
    },
}

PERFORMANCE_OPTIMIZATION_STRATEGIES: dict[str, list[str]] = {
    "data_loading": [
        "Hold the data in memory (data.memory_bytes), or decode its pictures once (acrlpd data cache)",
        "Read in more processes (data.num_workers)",
    ],
    "model_computation": [
        "Fewer Euler steps in the target (agent.target_flow_steps)",
        "Fewer candidates in the target (agent.target_samples), or none (agent.target implicit)",
        "Freeze the vision-language model where the data is small (policy.freeze_pi0_backbone)",
    ],
    "memory_management": [
        "Plan before the run (acrlpd plan)",
        "Candidates in blocks (agent.best_of_n_strategy chunked)",
        "Activations computed again (policy.remat)",
    ],
    "distributed_training": [
        "Split large parameters over devices (fsdp_devices)",
        "Keep fsdp_devices as small as memory allows: what is split must be gathered at every use",
    ],
}

HYPERPARAMETER_TUNING_PROTOCOL: dict[str, dict[str, Any]] = {
    "phase_1_bc_weight": {
        "search_space": {"agent.loss_weights.bc_weight": [0.001, 0.005, 0.01, 0.02, 0.05, 0.1]},
        "evaluation_metric": "eval/success_rate",
        "tuning_steps": 50_000,
    },
    "phase_2_critic_architecture": {
        "search_space": {
            "agent.critic.num_critics": [6, 8, 10, 12, 15],
            "agent.critic.hidden_dims": [(256, 256), (512, 256), (512, 512, 256)],
        },
        "evaluation_metric": "train/td_error_mean",
        "tuning_steps": 100_000,
    },
    "phase_3_best_of_n": {
        "search_space": {"agent.best_of_n_samples": [8, 16, 32, 64]},
        "evaluation_metric": "eval/success_rate",
        "tuning_steps": 50_000,
    },
}
"""Phases to run in order, each with the best values of the one before; ``platforms.tuning_runs`` makes the runs."""
